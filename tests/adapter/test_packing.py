"""The matrices of layers in PEFT's factors, against live models of PEFT."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.layer import ParamWrapper

from pissa_kernels.adapter.packing import Packing, packing_of

from ..convert.kinds import Kinds, adapted, factors, layers_of, products

MODULES = ["attn", "conv1", "conv2", "conv3", "grouped", "proj"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_matrices_are_those_of_peft(transposed: bool) -> None:
    torch.manual_seed(0)
    model = adapted(Kinds(transposed=transposed), target_modules=MODULES, target_parameters=PARAMETERS)
    for name, layer in layers_of(model):
        A, B = (factor.detach() for factor in factors(layer))
        packing = packing_of(A.shape, B.shape, layer.num_experts if isinstance(layer, ParamWrapper) else 1)
        left, right = packing.split(A, B)[::-1]
        wanted = products(layer, A, B)
        assert packing.parts == len(wanted)
        gain = 2 if name.endswith("out_proj") else 1
        for found, matrix in zip(left.double() @ right.double(), wanted, strict=True):
            assert torch.allclose(gain * layer.scaling["default"] * found, matrix, rtol=1e-12, atol=1e-14), name
        assert packing.shapes(layer.r["default"], (left.shape[1], right.shape[2])) == (A.shape, B.shape)
        assert all(torch.equal(*pair) for pair in zip(packing.join(right, left), (A, B), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 4),
    parts=st.integers(1, 5),
    out=st.integers(1, 6),
    inputs=st.integers(1, 6),
    kernel=st.lists(st.integers(1, 3), max_size=3),
)
def test_join_is_the_inverse_of_split(rank: int, parts: int, out: int, inputs: int, kernel: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    packing = Packing(groups=parts, kernel=tuple(kernel)) if kernel else Packing(experts=parts)
    shapes = packing.shapes(rank * parts if kernel else rank, (out, inputs * math.prod(kernel)))
    A, B = (torch.randn(shape, generator=generator) for shape in shapes)
    assert packing_of(A.shape, B.shape, packing.experts) == packing
    matrices = packing.split(A, B)
    assert [tuple(stack.shape) for stack in matrices] == [
        (parts, rank, inputs * math.prod(kernel)),
        (parts, out, rank),
    ]
    assert all(torch.equal(*pair) for pair in zip(packing.join(*matrices), (A, B), strict=True))


@pytest.mark.parametrize(
    ("A", "B", "experts", "words"),
    [
        ((8, 6), (5, 7), 4, r"accepted are \(4·r, in\) and \(out, r·4\)"),
        ((9, 6), (5, 9), 4, r"accepted are \(4·r, in\) and \(out, r·4\)"),
        ((4, 6, 3), (5, 4), 1, "of a convolution"),
        ((4, 6, 3), (6, 3, 1), 1, "of a convolution"),
        ((4, 6, 3), (5, 2, 1), 1, "of a convolution"),
        ((4, 6, 3), (6, 2, 3), 1, "of a convolution"),
        ((4,), (4,), 1, "of a convolution"),
    ],
)
def test_shapes_that_are_no_factors(A: tuple[int, ...], B: tuple[int, ...], experts: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        packing_of(A, B, experts)
