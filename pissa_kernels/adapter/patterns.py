"""Rank, alpha and scaling of each layer, as PEFT reads them out of an adapter's config and as a new config says them.

A pattern's keys are regular expressions, of which the first in the file's order that matches a whole tail of the
module's name, after a dot, decides.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
# Of two quotients that are the same number: some units in the last place of a float64.
TOLERANCE = 2.0**-50


def rank_of(config: Config, name: str) -> int:
    """r of a layer."""
    return int(_looked_up(config.get("rank_pattern") or {}, name, config["r"]))


def scaling_of(config: Config, name: str) -> float:
    """s of a layer: alpha/r, or alpha/√r where the config says rsLoRA."""
    alpha = _looked_up(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return float(alpha / _divisor(config, rank_of(config, name)))


def same(scaling: float, other: float) -> bool:
    """Whether two scalings are one, to the rounding of the quotients that they are."""
    return math.isclose(scaling, other, rel_tol=TOLERANCE, abs_tol=0.0)


def with_ranks(config: Config, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The config that gives layers these ranks, and leaves each the scaling that it has.

    The keys of its patterns are kept where they still can say it; else each layer that deviates is named.

    Args:
        config: of the adapter.
        ranks: of every layer, by its name.
    """
    alphas = {name: _alpha(scaling_of(config, name), _divisor(config, rank)) for name, rank in ranks.items()}
    r, rank_pattern = _said(config.get("rank_pattern") or {}, ranks)
    alpha, alpha_pattern = _said(config.get("alpha_pattern") or {}, alphas)
    return {
        **config,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def pattern_key(pattern: Mapping[str, Any], name: str) -> str | None:
    """The key of a pattern that decides for a layer, or None: the default does.

    Raises:
        ValueError: a key is no regular expression.
    """
    found = next((key for key in pattern if _matches(key, name)), None)
    return name if found is None and name in pattern else found


def _matches(key: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({key})$", name) is not None
    except re.error as error:
        raise ValueError(f"the pattern {key!r} is no regular expression: {error}") from None


def _looked_up(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    key = pattern_key(pattern, name)
    return default if key is None else pattern[key]


def _divisor(config: Config, rank: int) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else rank


def _alpha(scaling: float, divisor: float) -> int | float:
    """What divided comes nearest to a scaling, which is it or its neighbour; a whole number where one does."""
    product = scaling * divisor
    near = (round(product), product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    return min(near, key=lambda alpha: abs(alpha / divisor - scaling))


def _said(pattern: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A default and a pattern that give every layer its value."""
    groups: dict[str | None, list[Any]] = {}
    for name, value in wanted.items():
        groups.setdefault(pattern_key(pattern, name), []).append(value)
    common = Counter(wanted.values()).most_common(1)[0][0]
    if _agree(list(wanted.values())):
        return common, {}
    if all(map(_agree, groups.values())):
        return groups.get(None, [common])[0], {key: groups[key][0] for key in pattern if key in groups}
    # "^" keeps the tail rule out of it, so that the order of the keys, which PEFT sorts when it saves, does not matter
    return common, {f"^{re.escape(name)}": value for name, value in wanted.items() if not _agree([value, common])}


def _agree(values: list[Any]) -> bool:
    return all(same(value, values[0]) for value in values)
