"""Unit roundoff and the reconstruction bound."""

from __future__ import annotations

import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.numerics import BLOCK_ELEMENTS, UNIT_ROUNDOFF, reconstruction

from .support.reference import realistic


@pytest.mark.parametrize("dtype", list(UNIT_ROUNDOFF))
def test_unit_roundoff_is_half_the_machine_epsilon(dtype: torch.dtype) -> None:
    assert UNIT_ROUNDOFF[dtype] == torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", list(UNIT_ROUNDOFF))
@pytest.mark.parametrize("scaling", [1.0, 0.125, 3.0])
def test_a_decomposition_is_within_its_reconstruction_bound(dtype: torch.dtype, scaling: float) -> None:
    W = realistic(90, 70).to(dtype)
    d = pk.decompose(W, 6, scaling=scaling)
    worst = reconstruction(W, d.residual, d.lora_A, d.lora_B, scaling)
    assert 0 < worst <= 1
    assert worst > 0.2, "the bound is not loose"


@pytest.mark.parametrize("dtype", list(UNIT_ROUNDOFF))
def test_two_units_in_one_element_exceed_the_bound(dtype: torch.dtype) -> None:
    W = realistic(90, 70).to(dtype)
    d = pk.decompose(W, 6)
    index = divmod(int(d.residual.abs().argmax()), 70)
    # the product's float32 rounding is part of the bound; in float32 it is the larger part
    units = 4 if dtype != torch.float32 else 4 * (6 + 2)
    d.residual[index] *= 1 + units * torch.finfo(dtype).eps
    assert reconstruction(W, d.residual, d.lora_A, d.lora_B, 1.0) > 1


def test_the_factors_of_another_scaling_exceed_the_bound() -> None:
    W = realistic(90, 70).bfloat16()
    d = pk.decompose(W, 6, scaling=2.0)
    assert reconstruction(W, d.residual, d.lora_A, d.lora_B, 1.0) > 100


def test_every_block_of_rows_is_measured() -> None:
    columns = 512
    rows = 2 * BLOCK_ELEMENTS // columns + 3
    W = torch.ones(rows, columns)
    A, B = torch.zeros(1, columns), torch.zeros(rows, 1)
    assert reconstruction(W, W, A, B, 1.0) == 0
    for row in (0, rows // 2, rows - 1):
        residual = W.clone()
        residual[row, 3] = 1.01
        assert reconstruction(W, residual, A, B, 1.0) > 1, row


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_residual_that_is_not_finite_is_infinitely_far_off(value: float) -> None:
    W = torch.ones(4, 5)
    residual = W.clone()
    residual[2, 2] = value
    assert reconstruction(W, residual, torch.zeros(1, 5), torch.zeros(4, 1), 1.0) == float("inf")
