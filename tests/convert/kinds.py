"""Small models with every kind of layer that PEFT adapts, in the state that PiSSA starts from, and trained.

The state is made by hand, from ``torch.linalg.svd`` in float64 and the definition of each kind in loops.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

EXPERTS, HIDDEN, INNER, TOKENS = 5, 12, 7, 30


class Experts(nn.Module):
    """Fused experts, each of which sees every token. ``names`` are registered in this order."""

    def __init__(self, names: Sequence[str], *, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.names = names
        shapes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER), "gate_up_bias": (2 * INNER,)}
        for name in names:
            shape = shapes.get(name, (INNER, HIDDEN))
            shape = shape[::-1] if transposed else shape
            self.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *shape) / HIDDEN**0.5))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape)
        weights = {name: getattr(self, name) for name in self.names}
        for expert in range(EXPERTS):
            turned = {name for name, weight in weights.items() if self.is_transposed and weight.ndim > 2}
            one = {name: weight[expert].mT if name in turned else weight[expert] for name, weight in weights.items()}
            if "gate_up_proj" in one:
                gate, up = (x @ one["gate_up_proj"].mT + one.get("gate_up_bias", 0.0)).chunk(2, dim=-1)
                total = total + (torch.tanh(gate) * up) @ one["down_proj"].mT
            else:
                total = total + (torch.tanh(x @ one["w1"].mT) * (x @ one["w3"].mT)) @ one["w1"]
        return total


class Kinds(nn.Module):
    """One layer of each kind around fused experts."""

    def __init__(self, names: Sequence[str] = ("gate_up_proj", "down_proj"), *, transposed: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = Experts(names, transposed=transposed)
        self.embed = nn.Embedding(TOKENS, HIDDEN)
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.attn = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.conv1 = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.grouped = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(3, 4, (3, 2), padding=1)
        self.conv3 = nn.Conv3d(2, 2, (2, 1, 3), padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.proj(self.embed(ids))
        x = x + self.attn(x, x, x)[0]
        x = x + self.mlp.experts(x)
        x = x + self.grouped(self.conv1(x.mT)).mT
        images = self.conv2(x.reshape(len(x), 3, -1, 4))
        volumes = self.conv3(images.flatten(1)[:, : 2 * 36].reshape(len(x), 2, 3, 3, 4))
        return torch.cat([x.flatten(1), volumes.flatten(1)], dim=1)


def output(model: Any) -> Tensor:
    """The model's output in float64 arithmetic on its own weights."""
    torch.manual_seed(3)
    ids = torch.randint(0, TOKENS, (6, 8))
    with torch.no_grad():
        return copy.deepcopy(model).eval().double()(ids)


def adapted(base: nn.Module, **settings: Any) -> Any:
    """A PEFT model of a copy, in the state that PiSSA starts from."""
    config = peft.LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": []} | settings))
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for _, layer in layers_of(model):
        _start(layer)
    return model


def layers_of(model: Any) -> list[tuple[str, Any]]:
    return [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def weight_of(layer: Any) -> nn.Parameter:
    base = layer.get_base_layer()
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    parameter: nn.Parameter = getattr(base, "in_proj_weight" if isinstance(layer, MultiheadAttention) else name)
    return parameter


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def matrices(layer: Any) -> list[Tensor]:
    """The matrices (out, in) that a layer multiplies with, in float64."""
    W = weight_of(layer).detach().double()
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        if W.ndim == 2:
            return [W]
        return [matrix.mT if base.is_transposed else matrix for matrix in W]
    if W.ndim > 2:
        width = W.shape[1]
        found = []
        for group, rows in enumerate(W.chunk(base.groups)):
            full = W.new_zeros(len(rows), width * base.groups, *W.shape[2:])
            full[:, group * width : (group + 1) * width] = rows
            found.append(full.flatten(1))
        return found
    return [W.mT if isinstance(base, nn.Embedding) else W]


def products(layer: Any, A: Tensor, B: Tensor) -> list[Tensor]:
    """s·B·A of each matrix of a layer, from factors as PEFT stores them, in float64."""
    parts = len(matrices(layer))
    A, B, s = A.detach().double().flatten(1), B.detach().double(), scaling_of(layer)
    if isinstance(layer, ParamWrapper):
        rank = len(A) // parts
        return [s * sum(B[:, [k * parts + e]] @ A[[e * rank + k]] for k in range(rank)) for e in range(parts)]  # type: ignore[misc]
    return [s * b.flatten(1) @ a for a, b in zip(A.chunk(parts), B.chunk(parts), strict=True)]


def scaling_of(layer: Any) -> float:
    """The factor of B·A. PEFT 0.21 adds the product of an attention's output projection twice."""
    twice = isinstance(layer.get_base_layer(), nn.modules.linear.NonDynamicallyQuantizableLinear)
    return float(layer.scaling["default"]) * (2 if twice else 1)


def put(layer: Any, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Store B = left and A = right of each matrix as PEFT packs them."""
    A, B = factors(layer)
    parts, rank = len(left), left[0].shape[1]
    with torch.no_grad():
        if isinstance(layer, ParamWrapper):
            for e in range(parts):
                for k in range(rank):
                    A[e * rank + k] = right[e][k]
                    B[:, k * parts + e] = left[e][:, k]
        else:
            A.copy_(torch.cat(list(right)).reshape(A.shape))
            B.copy_(torch.cat(list(left)).reshape(B.shape))


def _start(layer: Any) -> None:
    """A₀, B₀ and the residual of one layer."""
    s, W = scaling_of(layer), weight_of(layer)
    parts = matrices(layer)
    A, _ = factors(layer)
    rank = len(A) // len(parts) if A.ndim > 2 or isinstance(layer, ParamWrapper) else len(A)
    left, right = [], []
    for matrix in parts:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        root = (S[:rank] / s).sqrt()
        left.append(U[:, :rank] * root)
        right.append(root[:, None] * Vh[:rank])
    put(layer, left, right)
    A, B = factors(layer)
    residual = [matrix - product for matrix, product in zip(parts, products(layer, A, B), strict=True)]
    with torch.no_grad():
        W.copy_(_weight(layer, residual))


def _weight(layer: Any, parts: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`matrices`."""
    W, base = weight_of(layer), layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        turned = base.is_transposed and W.ndim == 3
        return torch.stack([part.mT if turned else part for part in parts]).reshape(W.shape)
    if W.ndim > 2:
        width, groups = W.shape[1], len(parts)
        full = [part.reshape(len(part), groups, width, *W.shape[2:])[:, group] for group, part in enumerate(parts)]
        return torch.cat(full)
    return parts[0].mT if isinstance(base, nn.Embedding) else parts[0]


def train(model: Any, amount: float = 0.3) -> None:
    """Change everything that is trained, in every matrix, as no optimizer would leave it unchanged."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                size = float(parameter.std()) if parameter.numel() > 1 else 1.0
                parameter += amount * size * torch.randn(parameter.shape, generator=generator)


def save(folder: Path, base: nn.Module, model: Any) -> None:
    """Save "base", "residual" with its initial adapter in "pissa_init", and after training "trained"."""
    for name, state in (("base", base), ("residual", model.get_base_model())):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        weights = {
            key.replace(".base_layer", ""): value.contiguous()
            for key, value in state.state_dict().items()
            if "lora_" not in key
        }
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    model.save_pretrained(folder / "residual" / "pissa_init")
    train(model)
    model.save_pretrained(folder / "trained")
