"""Energies and least ranks, against sums done by hand and against the weights themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pissa_kernels import Certificate, LayerReport, truncated_svd
from pissa_kernels.report.spectrum import (
    cumulative_energy,
    energy_of_all,
    frobenius_squared,
    least_rank,
    peft_pattern,
    suggestion,
)

from ..support.reports import in_first_triplets, layer, llama


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def of(weight: torch.Tensor, rank: int) -> LayerReport:
    svd = truncated_svd(weight, rank)
    return layer("w", shape=tuple(weight.shape), rank=rank, singular_values=svd.S, certificate=svd.certificate)


def test_against_the_weight(weight: torch.Tensor) -> None:
    squares = torch.linalg.svdvals(weight.double()).square()
    entry = of(weight, 12)
    assert frobenius_squared(entry) == pytest.approx(float(squares.sum()), rel=1e-5)
    expected = (squares.cumsum(0) / squares.sum())[:12]
    torch.testing.assert_close(cumulative_energy(entry), expected, rtol=1e-5, atol=0)
    for k in range(1, 13):
        # a decomposition of rank k reports the same energy
        assert float(cumulative_energy(entry)[k - 1]) == pytest.approx(of(weight, k).certificate.energy, rel=1e-5)
    share = float(expected[5])
    assert least_rank(entry, share * 0.999, "whole") == 6
    assert least_rank(entry, share * 1.001, "whole") == 7
    assert least_rank(entry, float(expected[11]) * 1.001, "whole") is None


def test_by_hand() -> None:
    entry = layer("w", (4.0, 2.0, 1.0), energy=0.5)  # squares 16, 4, 1 of 42
    assert frobenius_squared(entry) == 42
    torch.testing.assert_close(cumulative_energy(entry), torch.tensor([16, 20, 21], dtype=torch.float64) / 42)
    assert [least_rank(entry, share) for share in (0.01, 16 / 21, 0.77, 20 / 21, 0.96, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert [least_rank(entry, share, "whole") for share in (0.3, 0.4, 0.5, 0.51, 1.0)] == [1, 2, 3, None, None]
    # 21 of 42 and 1 of 4
    assert energy_of_all([entry, layer("k", (1.0,), 0.25)]) == pytest.approx(22 / 46)


@pytest.mark.parametrize("rank", [1, 4])
def test_any_rank_captures_all_of_a_zero_matrix(rank: int) -> None:
    entry = of(torch.zeros(30, 20), rank)
    assert frobenius_squared(entry) == 0
    assert cumulative_energy(entry).tolist() == [1.0] * rank
    assert least_rank(entry, 1.0) == least_rank(entry, 1.0, "whole") == 1
    assert energy_of_all([entry]) == energy_of_all([]) == 1.0
    assert energy_of_all([entry, layer("q")]) == 0.5


def test_full_rank_captures_the_whole(weight: torch.Tensor) -> None:
    assert least_rank(of(weight, 20), 0.999, "whole") is not None
    trailing = layer("w", (1.0, 0.0, 0.0), 1.0)
    assert least_rank(trailing, 1.0) == least_rank(trailing, 1.0, "whole") == 1


@given(
    st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=12),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1, exclude_min=True),
)
def test_least_rank_suffices_and_no_lower_rank_does(sigma: list[float], energy: float, share: float) -> None:
    entry = layer("w", sorted(sigma, reverse=True), energy, certificate=Certificate(1, energy, 0.0, True, "svd"))
    held = cumulative_energy(entry).tolist()
    assert held == sorted(held)
    assert held[-1] == energy
    whole = least_rank(entry, share, "whole")
    assert (whole is None) == (held[-1] < share)
    if whole is not None:
        assert held[whole - 1] >= share
        assert whole == 1 or held[whole - 2] < share
    captured = least_rank(entry, share)
    assert captured is not None
    assert 1 <= captured <= entry.rank
    assert held[captured - 1] >= share * energy * (1 - 1e-12)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan"), 90])
def test_a_share_out_of_range(share: float) -> None:
    for call in (lambda: least_rank(layer("q"), share), lambda: suggestion([layer("q")], share)):
        with pytest.raises(ValueError, match=r"above 0 and at most 1, as in 0\.9; got"):
            call()


def test_suggestion() -> None:
    flat, steep = (1.0,) * 10, (10.0,) + (1.0,) * 9
    layers = [layer(f"h.{d}.{p}", s, 0.5) for d in range(2) for p, s in (("flat", flat), ("steep", steep))]
    assert suggestion(layers, 0.7) == (
        "70 % of the captured energy is kept by rank 7 in every layer, 7 in the median (from 1 in steep to 7 in flat); "
        "70 % of the whole energy is not reached"
    )
    assert suggestion([layer("q", flat, 1.0), layer("k", flat, 0.5)], 0.7).endswith(
        "70 % of the whole energy is reached in 1 of 2, by rank 7"
    )
    assert suggestion([layer("q", (1.0,))], 0.9).startswith("90 % of the captured energy is kept by rank 1 in every")
    assert "(" not in suggestion([layer("a.0.q"), layer("a.1.q")], 0.9), "one projection needs no comparison"
    with pytest.raises(ValueError, match="no layer was initialized"):
        suggestion([], 0.9)
    assert "\n" not in suggestion(llama(4).layers, 0.55)
    assert suggestion(llama(4).layers, 0.55).startswith("55 %")


PATTERNS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "the end of a name": (
        {"model.layers.0.attn.q": 3, "model.layers.1.attn.q": 5, "model.layers.0.k": 8, "lm_head": 2},
        {"q": 5, "lm_head": 2},
    ),
    "a longer end of a name": (
        {"h.0.attn.c_proj": 3, "h.1.attn.c_proj": 4, "h.0.mlp.c_proj": 8, "h.0.mlp.c_fc": 5},
        {"attn.c_proj": 4, "c_fc": 5},
    ),
    "the whole name": (
        {"l.0.attn.out.dense": 8, "l.0.out.dense": 3, "l.1.out.dense": 4, "q": 2, "l.0.q": 5},
        {"l.[0-9]+.out.dense": 4, "^q": 2, "l.[0-9]+.q": 5},
    ),
    "two stacks": (
        {"encoder.0.q": 3, "encoder.1.q": 3, "decoder.0.q": 6, "decoder.1.q": 8},
        {"encoder.[0-9]+.q": 3},
    ),
    "a name that is a number": ({"0": 3, "1": 4, "2": 4}, {}),
    "characters of regular expressions": ({"a.0.x+y(": 3, "a.0.z": 8}, {r"x\+y\(": 3}),
}


@pytest.mark.parametrize("case", list(PATTERNS))
def test_patterns_give_peft_the_ranks(case: str) -> None:
    ranks, expected = PATTERNS[case]
    layers = in_first_triplets(ranks)
    most, pattern = peft_pattern(layers, list(ranks.values()))
    assert (most, pattern) == (max(ranks.values()), expected)
    other = pytest.importorskip("peft.utils.other", reason="the rule is defined in PEFT")
    keys = list(pattern)
    for name, rank in ranks.items():
        for order in (keys, keys[::-1]):
            found: Any = pattern.get(other.get_pattern_key(order, name), most)
            assert found >= rank, name
