"""Patterns of an adapter's config: PEFT's rule, and new ranks that leave the scalings unchanged."""

from __future__ import annotations

import json
import math

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pissa_kernels.adapter.patterns import (
    has_name,
    matches,
    pattern_key,
    rank_of,
    scaling_of,
    with_ranks,
    without_order,
)

NAMES = ["model.layers.0.q", "model.layers.1.q", "model.layers.10.v", "q", "vision.model.layers.0.q"]
KEYS = st.sampled_from([*NAMES, "layers.0.q", r"layers\.\d\.q", "q|v", ".*v", "^q", "0.q", "layers", "(q", "^model.*"])


@given(st.lists(KEYS.filter(lambda key: key != "(q"), unique=True), st.sampled_from(NAMES))
def test_a_pattern_decides_as_in_peft(keys: list[str], name: str) -> None:
    theirs = peft.utils.other.get_pattern_key(keys, name)
    ours = pattern_key(dict.fromkeys(keys), name)
    assert (name if ours is None else ours) == theirs


def test_a_key_matches_the_whole_name_or_its_end_after_a_dot() -> None:
    assert [name for name in NAMES if matches("q", name)] == [name for name in NAMES if name.endswith("q")]
    assert [name for name in NAMES if matches("0.q", name)] == ["model.layers.0.q", "vision.model.layers.0.q"]
    assert not matches("layers", "model.layers.0.q")
    assert not matches("ayers.0.q", "model.layers.0.q")
    assert not matches("^q", "model.layers.0.q")
    with pytest.raises(ValueError, match=r"the pattern '\(q' is not a regular expression: "):
        matches("(q", "q")


@given(st.sampled_from([*NAMES, "layers.0.q", "0.q", "ayers.0.q", "layers", "model", "v", ""]), st.sampled_from(NAMES))
def test_a_name_applies_as_in_peft(entry: str, name: str) -> None:
    config = peft.LoraConfig(target_modules=[entry])
    assert has_name(entry, name) == bool(peft.tuners.tuners_utils.check_target_module_exists(config, name))


@given(st.dictionaries(KEYS.filter(lambda key: key != "(q"), st.integers(1, 9)))
def test_a_pattern_without_order_decides_alike_when_its_keys_are_sorted(pattern: dict[str, int]) -> None:
    def ranks(keys: list[str], values: dict[str, int]) -> list[int]:
        return [values.get(peft.utils.other.get_pattern_key(keys, name), 5) for name in NAMES]

    changed = without_order(pattern, NAMES, 5)
    assert ranks(sorted(changed), changed) == ranks(list(changed), changed) == ranks(list(pattern), pattern)


@given(
    r=st.integers(1, 300),
    alpha=st.one_of(st.integers(-3, 999), st.floats(1e-3, 1e3)),
    ranks=st.dictionaries(KEYS.filter(lambda key: key != "(q"), st.integers(1, 300)),
    alphas=st.dictionaries(KEYS.filter(lambda key: key != "(q"), st.floats(1e-3, 1e3)),
    rslora=st.booleans(),
    rank=st.one_of(st.none(), st.integers(1, 600)),
)
def test_new_ranks_keep_the_scalings(
    r: int, alpha: float, ranks: dict[str, int], alphas: dict[str, float], rslora: bool, rank: int | None
) -> None:
    config = {"r": r, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    wanted = {name: min(rank or 10**9, 2 * rank_of(config, name)) for name in NAMES}
    changed = with_ranks(config, wanted)
    # PEFT sorts the keys when it saves a loaded adapter; new keys each name one layer, so the order must not matter
    for pattern in ("rank_pattern", "alpha_pattern"):
        if all(key.startswith("^model") or key.startswith("^vision") for key in changed[pattern]):
            changed[pattern] = dict(sorted(changed[pattern].items()))
    for name in NAMES:
        assert rank_of(changed, name) == wanted[name]
        assert math.isclose(scaling_of(changed, name), scaling_of(config, name), rel_tol=1e-15)
    assert json.loads(json.dumps(changed)) == changed


def test_patterns_that_still_hold_are_kept() -> None:
    config = {"r": 4, "lora_alpha": 16, "rank_pattern": {"q": 8, "none": 3}, "alpha_pattern": {r"1\.q": 5}}
    changed = with_ranks(config, {name: 2 * rank_of(config, name) for name in NAMES})
    assert changed == {"r": 8, "lora_alpha": 32, "rank_pattern": {"q": 16}, "alpha_pattern": {r"1\.q": 10}}
    changed = with_ranks(config, dict.fromkeys(NAMES, 4))
    assert changed["rank_pattern"] == {}
    assert changed["alpha_pattern"][r"^model\.layers\.10\.v"] == 16
