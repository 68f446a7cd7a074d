"""Truncation to a lower rank, against dense SVDs in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pissa_kernels.convert.convert import convert_adapter

Weights = dict[str, torch.Tensor]


def write_adapter(folder: Path, factors: Weights, **changes: Any) -> None:
    """Write an adapter as PEFT saves it, without PEFT."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": "olora", "target_modules": ["w"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def random_adapter(shapes: list[tuple[int, int, int]], seed: int, dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{index}.w.lora_{factor}.weight": torch.randn(shape, generator=generator).to(dtype)
        for index, (out, width, r) in enumerate(shapes)
        for factor, shape in (("A", (r, width)), ("B", (out, r)))
    }


def delta(weights: Weights, index: int) -> torch.Tensor:
    A, B = (weights[f"base_model.model.{index}.w.lora_{factor}.weight"].double() for factor in "AB")
    return B @ A


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(*[st.integers(1, 24)] * 2, st.integers(1, 6)), min_size=1, max_size=3),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    rslora=st.booleans(),
)
def test_the_result_is_the_nearest_of_its_rank(
    shapes: list[tuple[int, int, int]], data: st.DataObject, dtype: torch.dtype, rslora: bool, tmp_path: Path
) -> None:
    rank = data.draw(st.integers(1, 2 * max(r for *_, r in shapes)), label="K")
    alphas = data.draw(st.lists(st.integers(1, 64), min_size=len(shapes), max_size=len(shapes)), label="alphas")
    patterns = {
        "rank_pattern": {f"{index}.w": r for index, (*_, r) in enumerate(shapes)},
        "alpha_pattern": {f"{index}.w": alpha for index, alpha in enumerate(alphas)},
        "use_rslora": rslora,
    }
    initial, trained = random_adapter(shapes, 0, dtype), random_adapter(shapes, 1, dtype)
    write_adapter(tmp_path / "initial", initial, **patterns)
    write_adapter(tmp_path / "trained", trained, **patterns)
    shutil.rmtree(tmp_path / "lora", ignore_errors=True)
    done = convert_adapter(tmp_path / "trained", tmp_path / "initial", tmp_path / "lora", rank=rank)
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    tails, norms = 0.0, 0.0
    for index, (layer, (*shape, r), alpha) in enumerate(zip(done.layers, shapes, alphas, strict=True)):
        dense = delta(trained, index) - delta(initial, index)
        sigma = torch.linalg.svdvals(dense)
        kept = min(rank, 2 * r)
        tail = float(sigma[kept:].norm())
        assert (layer.rank, layer.shape) == (kept, tuple(shape))
        assert layer.loss == pytest.approx(tail / float(sigma.norm()), rel=1e-9, abs=1e-12)
        error = float((delta(weights, index) - dense).norm())
        assert error <= math.hypot(tail, 1e-6 * float(sigma.norm()))
        scaling = alpha / (math.sqrt(r) if rslora else r)
        assert layer.scaling == pytest.approx(scaling, rel=1e-15)
        tails, norms = math.hypot(tails, scaling * tail), math.hypot(norms, scaling * float(sigma.norm()))
    assert done.loss == pytest.approx(tails / norms, rel=1e-9, abs=1e-12)


def test_a_small_change_of_large_factors(tmp_path: Path) -> None:
    """Factors that change by 1e-6: in B·A − B₀·A₀, most digits would cancel."""
    initial = random_adapter([(30, 20, 4)], 0, torch.float64)
    trained = {key: value + 1e-6 * torch.sin(torch.arange(value.numel())).reshape(value.shape)
               for key, value in initial.items()}  # fmt: skip
    write_adapter(tmp_path / "initial", initial)
    write_adapter(tmp_path / "trained", trained)
    done = convert_adapter(tmp_path / "trained", tmp_path / "initial", tmp_path / "lora", rank=5)
    sigma = torch.linalg.svdvals(delta(trained, 0) - delta(initial, 0))
    assert done.loss == pytest.approx(float(sigma[5:].norm() / sigma.norm()), rel=1e-6, abs=1e-9)
