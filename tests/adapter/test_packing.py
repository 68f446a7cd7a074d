"""The matrices of layers in PEFT's factors, and conversions that PEFT's save_pretrained writes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file

from pissa_kernels.adapter.packing import Packing, packing_of, restack_file, restacked, stacked

from ..convert.kinds import Kinds, adapted, factors, layers_of, output, products, save

MODULES = ["attn", "conv1", "conv2", "conv3", "grouped", "proj"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


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
def test_stacked_factors_have_the_difference_in_every_matrix(
    rank: int, parts: int, out: int, inputs: int, kernel: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    packing = Packing(groups=parts, kernel=tuple(kernel)) if kernel else Packing(experts=parts)
    r = rank * parts if kernel else rank
    shapes = packing.shapes(r, (out, inputs * math.prod(kernel)))
    A, A0 = (torch.randn(shapes[0], generator=generator, dtype=torch.float64) for _ in range(2))
    B, B0 = (torch.randn(shapes[1], generator=generator, dtype=torch.float64) for _ in range(2))
    found = stacked(A, B, A0, B0, packing)
    (new_A, new_B), (old_A, old_B), (both_A, both_B) = (packing.split(*pair) for pair in ((A, B), (A0, B0), found))
    assert both_A.shape[1] == 2 * rank
    assert torch.allclose(both_B @ both_A, new_B @ new_A - old_B @ old_A, rtol=1e-12, atol=1e-12)
    assert packing_of(found[0].shape, found[1].shape, packing.experts) == packing
    again = restacked(torch.cat([A, A0]), torch.cat([B, -B0], dim=1), packing)
    assert all(torch.equal(*pair) for pair in zip(again, found, strict=True))


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


def convert_with_peft(folder: Path, base: Any, **settings: Any) -> Any:
    """A trained model that PEFT has saved as a plain LoRA, in "lora"."""
    model = adapted(base, **settings)
    save(folder, base, model)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(
        folder / "lora", path_initial_model_for_weight_conversion=str(folder / "residual" / "pissa_init")
    )
    return model


@pytest.mark.parametrize("rank_pattern", [{}, {"gate_up_proj": 3, "grouped": 4}])
def test_peft_stacks_experts_and_groups_as_if_they_were_one_matrix(rank_pattern: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Kinds()
    model = convert_with_peft(
        tmp_path, base, target_modules=MODULES, target_parameters=PARAMETERS, rank_pattern=rank_pattern
    )
    path = tmp_path / "lora" / "adapter_model.safetensors"
    assert off(output(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")), output(model)) > 1e-2
    tensors = load_file(path)
    before = dict(tensors)
    experts = {
        f"base_model.model.{name}": layer.num_experts
        for name, layer in layers_of(model)
        if isinstance(layer, ParamWrapper)
    }
    restack_file(tensors, experts)
    changed = {key for key, value in tensors.items() if not torch.equal(value, before[key])}
    assert {key.split(".lora_")[0] for key in changed} == {*experts, "base_model.model.grouped"}
    save_file(tensors, path, metadata={"format": "pt"})
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    assert off(output(plain), output(model)) <= 1e-6


def test_a_file_that_has_not_two_adapters_is_refused() -> None:
    tensors = {
        "base_model.model.e.lora_A.weight": torch.ones(12, 5),
        "base_model.model.e.lora_B.weight": torch.ones(3, 12),
    }
    with pytest.raises(ValueError, match=r"^layer 'e': lora_A has shape \(12, 5\) .* with 4 matrices each"):
        restack_file(tensors, {"base_model.model.e": 4})
