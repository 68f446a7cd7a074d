"""decompose: factors, residual, orientation, layout; a refused weight is unchanged."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.factors import Recipe, tolerance

from .support.reference import ROUNDOFF, energy_deficit, realistic

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_reconstructs(W: Tensor, d: pk.Decomposition, scaling: float, fan_in_fan_out: bool = False) -> None:
    """|W − residual − s·B·A| within one rounding of the residual and the float32 product, in fp64."""
    product = scaling * d.lora_B.double() @ d.lora_A.double()
    magnitude = scaling * d.lora_B.double().abs() @ d.lora_A.double().abs()
    if fan_in_fan_out:
        product, magnitude = product.mT, magnitude.mT
    u, tiny = ROUNDOFF[W.dtype], torch.finfo(W.dtype).tiny
    exact = W.double() - product
    arithmetic = (d.lora_A.shape[0] + 2) * 2**-24 * (W.double().abs() + magnitude)
    bound = u * (exact.abs() + arithmetic) + arithmetic + u * tiny
    assert ((d.residual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 16 / math.sqrt(8)])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (500, 400)])
def test_factors_and_residual(dtype: torch.dtype, fan_in_fan_out: bool, scaling: float, shape: tuple[int, int]) -> None:
    W = realistic(*shape).to(dtype)
    stored = W.mT.contiguous() if fan_in_fan_out else W
    d = pk.decompose(stored, 8, scaling=scaling, fan_in_fan_out=fan_in_fan_out)
    assert d.lora_A.shape == (8, shape[1])
    assert d.lora_B.shape == (shape[0], 8)
    for factor in (d.lora_A, d.lora_B):
        assert factor.dtype == torch.float32
        assert factor.is_contiguous()
        assert torch.equal(factor, factor.to(dtype).float()), "exact in the dtype that stores it"
    assert_reconstructs(stored, d, scaling, fan_in_fan_out)
    exact = torch.linalg.svdvals(W.double())
    assert (d.singular_values.double() - exact[:8]).abs().max() <= 1e-5 * exact[0]
    # rounding A costs energy to second order in the dtype's roundoff: 2.5e-6 was measured for bf16
    assert energy_deficit(W, d.lora_A) <= 1e-6 + ROUNDOFF[dtype] ** 2
    # A and B share the singular values evenly: ‖a_i‖² = ‖b_i‖² = σ_i/s
    for squares in (d.lora_A.double().square().sum(1), d.lora_B.double().square().sum(0)):
        torch.testing.assert_close(squares * scaling, exact[:8], rtol=1e-5 + 2 * ROUNDOFF[dtype], atol=0)


def test_factors_that_would_be_rounded_to_zero() -> None:
    """Training cannot move A and B away from 0."""
    W = realistic(60, 40).half()
    pk.decompose(W, 4, scaling=1e6)
    pk.decompose(torch.zeros_like(W), 4, scaling=1e6)
    pk.decompose(W.bfloat16(), 4, scaling=1e20)
    with pytest.raises(ValueError, match=r"^the factors of the weight leave the range of torch.float16"):
        pk.decompose(W, 4, scaling=1e20)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2"])
def test_layout_and_storage(init: str) -> None:
    W = realistic(60, 40).bfloat16()
    padded = W.new_zeros(120, 48)
    padded[::2, 4:44] = W
    for view in (W, W.mT.contiguous().mT, padded[::2, 4:44]):
        kept = view.clone()
        d = pk.decompose(view, 4, init=init)
        assert torch.equal(view, kept), "not in place"
        assert d.residual.data_ptr() != view.data_ptr()
        if view.is_contiguous() or view.mT.is_contiguous():
            assert d.residual.stride() == view.stride()
        same = pk.decompose(view, 4, init=init, inplace=True)
        assert same.residual.data_ptr() == view.data_ptr()
        assert same.residual.stride() == view.stride()
        assert torch.equal(same.residual, d.residual)
        assert torch.equal(view, d.residual)


def test_a_parameter_stays_a_leaf() -> None:
    weight = torch.nn.Parameter(realistic(60, 40).float())
    before = weight.detach().clone()
    d = pk.decompose(weight, 4, inplace=True)
    assert weight.is_leaf
    assert weight.requires_grad
    assert not d.residual.requires_grad
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(("init", "niter"), [("pissa", None), ("pissa_niter_0", 0), ("pissa_niter_16", 16)])
def test_a_recipe_parses_its_initializer(init: str, niter: int | None) -> None:
    recipe = Recipe(8, 2.0, init, seed=3)
    assert (recipe.rank, recipe.scaling, recipe.init, recipe.seed, recipe.niter) == (8, 2.0, init, 3, niter)
    with pytest.raises(FrozenInstanceError):
        recipe.rank = 4  # type: ignore[misc]


def test_a_recipe_with_another_initializer_is_refused() -> None:
    with pytest.raises(ValueError, match="init_lora_weights should be 'pissa'"):
        Recipe(8, init="gaussian")


def test_the_tolerance_of_each_dtype() -> None:
    assert tolerance(torch.float32) == tolerance(torch.float16) == 1e-6
    assert tolerance(torch.bfloat16) == pytest.approx(2.5e-6, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_is_at_most_the_deficit_of_rounding_A(dtype: torch.dtype) -> None:
    W = realistic(700, 600).to(dtype)
    exact = torch.linalg.svd(W.double(), full_matrices=False)[2][:16]
    roots = torch.linalg.svdvals(W.double())[:16].sqrt()
    rounded = (roots[:, None] * exact).to(dtype)
    assert tolerance(dtype) <= max(1e-6, 1.2 * energy_deficit(W, rounded))
    assert energy_deficit(W, pk.decompose(W, 16).lora_A) <= tolerance(dtype) + 1.1 * energy_deficit(W, rounded) + 1e-9


def test_factors_are_rounded_to_the_adapter_dtype() -> None:
    W = realistic(96, 64).bfloat16()
    d = pk.decompose(W, 8, adapter_dtype=torch.float32)
    assert not torch.equal(d.lora_A, d.lora_A.bfloat16().float())
    assert_reconstructs(W, d, 1.0)
    assert energy_deficit(W, d.lora_A) <= 1e-6


def test_reconstruction_is_better_than_rounding_afterwards() -> None:
    """Rounding A and B after the residual is taken adds their rounding to the residual's."""
    W = realistic(300, 200).bfloat16()
    d = pk.decompose(W, 16)
    ours = (W.double() - d.residual.double() - d.lora_B.double() @ d.lora_A.double()).norm()
    full = pk.decompose(W, 16, adapter_dtype=torch.float32)
    A, B = full.lora_A.bfloat16().double(), full.lora_B.bfloat16().double()
    afterwards = (W.double() - full.residual.double() - B @ A).norm()
    assert ours < 0.75 * afterwards


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 50),
    n=st.integers(1, 50),
    rank=st.integers(1, 50),
    scaling=st.floats(0.01, 100),
    dtype=st.sampled_from(DTYPES),
    fan_in_fan_out=st.booleans(),
    zero=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_weight_is_reconstructed(
    m: int, n: int, rank: int, scaling: float, dtype: torch.dtype, fan_in_fan_out: bool, zero: bool, seed: int
) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype) * (0 if zero else 1)
    rank = min(rank, m, n)
    d = pk.decompose(W, rank, scaling=scaling, fan_in_fan_out=fan_in_fan_out)
    assert_reconstructs(W, d, scaling, fan_in_fan_out)


def test_global_random_state_is_neither_used_nor_changed() -> None:
    W = realistic(400, 350).bfloat16()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = pk.decompose(W, 8)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second = pk.decompose(W, 8)
    assert torch.equal(first.lora_A, second.lora_A)
    assert torch.equal(first.residual, second.residual)


DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
import pissa_kernels as pk
torch.manual_seed(int(sys.argv[2]))
W = torch.randn(500, 400, generator=torch.Generator().manual_seed(3)).bfloat16()
d = pk.decompose(W, 8, init=sys.argv[3])
digest = hashlib.sha256()
for t in (d.lora_A, d.lora_B, d.residual):
    digest.update(t.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_two_processes_agree_bit_for_bit(init: str) -> None:
    root = str(Path(__file__).parents[1])
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST, root, seed, init], capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rank": 9}, ValueError, r"\(10, 8\).*1 ≤ r ≤ 8, got r=9"),
        ({"rank": 0}, ValueError, "got r=0"),
        ({"scaling": 0.0}, ValueError, "scaling"),
        ({"scaling": -1.0}, ValueError, "scaling"),
        ({"scaling": math.nan}, ValueError, "scaling"),
        (
            {"init": "pissa_16"},
            ValueError,
            r"^init_lora_weights should be 'pissa' or 'pissa_niter_\[number of iters\]'",
        ),
        ({"init": "pissafoo"}, ValueError, "got pissafoo"),
        ({"init": "foo_niter_4"}, ValueError, "got foo_niter_4"),
        ({"init": "pissa_niter_x"}, ValueError, "an integer N ≥ 0"),
        ({"init": "pissa_niter_-1"}, ValueError, "an integer N ≥ 0"),
        ({"init": "pissa_niter_"}, ValueError, "an integer N ≥ 0"),
        ({"init": "pissa_niter_1_niter_2"}, ValueError, "an integer N ≥ 0"),
        ({"weight": torch.full((10, 8), math.nan)}, ValueError, "NaN"),
        ({"weight": torch.full((10, 8), math.inf)}, ValueError, "Inf"),
        ({"weight": torch.ones(10, 8, dtype=torch.float64)}, TypeError, "^Please initialize PiSSA under float32"),
        ({"weight": torch.ones(10, 8, dtype=torch.uint8)}, TypeError, "torch.uint8"),
        ({"weight": torch.ones(10, 1).expand(10, 8)}, ValueError, "own memory"),
    ],
)
def test_a_refused_weight_is_unchanged(change: dict, error: type[Exception], words: str) -> None:  # type: ignore[type-arg]
    weight = torch.linspace(-1, 1, 80).reshape(10, 8)
    arguments = {"weight": weight, "rank": 2, "inplace": True} | change
    before = arguments["weight"].clone()
    with pytest.raises(error, match=words):
        pk.decompose(**arguments)
    assert torch.equal(arguments["weight"].nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_residual_that_overflows_its_dtype_is_refused() -> None:
    """One element of the residual of the best rank-1 approximation is larger than float16's maximum."""
    top = torch.finfo(torch.float16).max
    W = torch.full((8, 8), top).half()
    W[0, 0] = -top
    before = W.clone()
    with pytest.raises(ValueError, match=r"residual exceeds the range of torch\.float16"):
        pk.decompose(W, 1, inplace=True)
    assert torch.equal(W, before)


def test_a_weight_of_the_largest_finite_values_is_accepted() -> None:
    W = torch.full((8, 8), torch.finfo(torch.float16).max).half()
    d = pk.decompose(W, 1)
    assert d.residual.isfinite().all()
    assert_reconstructs(W, d, 1.0)
