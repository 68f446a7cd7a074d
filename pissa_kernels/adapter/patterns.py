"""Rank, alpha and scaling of each layer: read from an adapter's config by PEFT's rules, and written to a new config.

The keys of ``rank_pattern`` and ``alpha_pattern`` are regular expressions. A key applies to a layer if it matches the
layer's whole name, or all that follows one of its dots; of several such keys, the first in the file decides.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Config = Mapping[str, Any]
# Relative difference of two quotients that stand for the same number: a few units in the last place of a float64.
TOLERANCE = 2.0**-50


def matches(key: str, name: str) -> bool:
    """Whether a pattern's key applies to a layer.

    Args:
        key: regular expression.
        name: the layer's name in the model.

    Raises:
        ValueError: the key is not a valid regular expression.
    """
    try:
        return re.match(rf"(.*\.)?({key})$", name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {key!r} is not a regular expression: {error}") from None


def has_name(entry: str, name: str) -> bool:
    """Whether a name in ``target_modules`` or ``exclude_modules`` applies to a module: its name, or the end of it.

    Args:
        entry: a name, not a regular expression.
        name: the module's name in the model.
    """
    return name == entry or name.endswith(f".{entry}")


def rank_of(config: Config, name: str) -> int:
    """Rank r of a layer."""
    return int(_lookup(config.get("rank_pattern") or {}, name, config["r"]))


def scaling_of(config: Config, name: str) -> float:
    """Scaling s of a layer: alpha/r, or alpha/√r with rsLoRA."""
    alpha = _lookup(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return float(alpha / _divisor(config, rank_of(config, name)))


def same(scaling: float, other: float) -> bool:
    """Whether two scalings are equal up to the round-off of the divisions that computed them."""
    return math.isclose(scaling, other, rel_tol=TOLERANCE, abs_tol=0.0)


def with_rank(config: Config, name: str, rank: int) -> dict[str, Any]:
    """A copy of the config in which one layer, which its patterns name first, has this rank and keeps its scaling."""
    alpha = _alpha(scaling_of(config, name), _divisor(config, rank))
    key = f"^{re.escape(name)}"
    return {
        **config,
        "rank_pattern": {key: rank, **(config.get("rank_pattern") or {})},
        "alpha_pattern": {key: alpha, **(config.get("alpha_pattern") or {})},
    }


def with_ranks(config: Config, ranks: Mapping[str, int]) -> dict[str, Any]:
    """A copy of the config in which the layers have these ranks and keep their scalings.

    The keys of its patterns stay if all layers that a key decides for still share one value. Otherwise the new pattern
    names each layer whose value differs from the most common one.

    Args:
        config: the adapter's config.
        ranks: new rank of every layer, by the layer's name.
    """
    alphas = {name: _alpha(scaling_of(config, name), _divisor(config, rank)) for name, rank in ranks.items()}
    r, rank_pattern = _default_and_pattern(config.get("rank_pattern") or {}, ranks)
    alpha, alpha_pattern = _default_and_pattern(config.get("alpha_pattern") or {}, alphas)
    return {
        **config,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def pattern_key(pattern: Mapping[str, Any], name: str) -> str | None:
    """The key of a pattern that decides for a layer; None if the layer gets the default.

    Raises:
        ValueError: a key is not a valid regular expression.
    """
    found = next((key for key in pattern if matches(key, name)), None)
    # Without a match, PEFT looks the name itself up: a key that is no match for itself, such as "x+", still decides.
    return name if found is None and name in pattern else found


def without_order(pattern: Mapping[str, Any], names: Iterable[str], default: Any) -> dict[str, Any]:
    """A pattern that gives every layer the same value in any order of its keys, which PEFT sorts when it saves.

    Args:
        pattern: the pattern; it is kept if its sorted keys decide alike.
        names: names of the layers.
        default: value of a layer that no key matches.
    """
    wanted = {name: _lookup(pattern, name, default) for name in names}
    if all(_lookup(dict(sorted(pattern.items())), name, default) == value for name, value in wanted.items()):
        return dict(pattern)
    return {f"^{re.escape(name)}": value for name, value in wanted.items() if value != default}


def _lookup(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    key = pattern_key(pattern, name)
    return default if key is None else pattern[key]


def _divisor(config: Config, rank: int) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else rank


def _alpha(scaling: float, divisor: float) -> int | float:
    """The alpha whose quotient by ``divisor`` is nearest to ``scaling``; an integer if one is as near."""
    product = scaling * divisor
    near = (round(product), product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    return min(near, key=lambda alpha: abs(alpha / divisor - scaling))


def _default_and_pattern(pattern: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A default and a pattern that give every layer its value, with the keys of ``pattern`` if they can.

    Args:
        pattern: the config's present pattern.
        wanted: value of every layer, by the layer's name.
    """
    groups: dict[str | None, list[Any]] = {}
    for name, value in wanted.items():
        groups.setdefault(pattern_key(pattern, name), []).append(value)
    common = Counter(wanted.values()).most_common(1)[0][0]
    if _all_same(list(wanted.values())):
        return common, {}
    if all(map(_all_same, groups.values())):
        return groups.get(None, [common])[0], {key: groups[key][0] for key in pattern if key in groups}
    # "^" limits a key to the whole name. PEFT sorts the keys when it saves, so their order must not matter.
    return common, {f"^{re.escape(name)}": value for name, value in wanted.items() if not same(value, common)}


def _all_same(values: list[Any]) -> bool:
    return all(same(value, values[0]) for value in values)
