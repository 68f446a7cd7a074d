"""A small model of one layer for each kind of layer that PEFT's LoRA adapts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from .reference import realistic

NAME = "layer"


class Stack(nn.Module):
    """Two stacks of expert weights, one applied to what the other has computed. Every expert gets its own inputs.

    Args:
        experts: E.
        width: size of the inputs and of the outputs.
        inner: size between them.
        is_transposed: whether the stacks are stored (E, in, out) and not (E, out, in).

    Attributes:
        read: the weights that the last forward pass has computed with, by the parameter's name.
    """

    def __init__(self, experts: int, width: int, inner: int, is_transposed: bool) -> None:
        super().__init__()
        self.width = width
        if is_transposed:
            self.is_transposed = True
        self.gate_up_proj = nn.Parameter(torch.empty(experts, *((width, inner) if is_transposed else (inner, width))))
        self.down_proj = nn.Parameter(torch.empty(experts, *((inner, width) if is_transposed else (width, inner))))
        self.read: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(E, samples, width) for inputs (E, samples, width)."""
        is_transposed = getattr(self, "is_transposed", False)
        self.read = {"gate_up_proj": self.gate_up_proj.detach(), "down_proj": self.down_proj.detach()}
        up, down = (each if is_transposed else each.mT for each in (self.gate_up_proj, self.down_proj))
        return torch.tanh(x @ up) @ down


class Matrix(nn.Module):
    """A matrix that a module keeps as a parameter of its own, as routers do.

    Attributes:
        read: as in :class:`Stack`.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(outputs, inputs))
        self.read: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(samples, outputs) for inputs (samples, inputs)."""
        self.read = {"table": self.table.detach()}
        return x @ self.table.mT


def whole(weight: Tensor) -> list[Tensor]:
    """One matrix, stored as it is."""
    return [weight]


def transposed(weight: Tensor) -> list[Tensor]:
    """One matrix, stored (in, out)."""
    return [weight.mT]


def flat(weight: Tensor) -> list[Tensor]:
    """The kernel of a convolution as (out, in·k)."""
    return [weight.flatten(1)]


def in_groups(groups: int) -> Callable[[Tensor], list[Tensor]]:
    """The kernel of each group of a convolution as (out/groups, in/groups·k)."""
    return lambda weight: list(weight.flatten(1).chunk(groups))


def stacked(weight: Tensor) -> list[Tensor]:
    """Matrices stored one after the other."""
    return list(weight)


def stacked_transposed(weight: Tensor) -> list[Tensor]:
    """Matrices stored one after the other, each (in, out)."""
    return list(weight.mT)


@dataclass(frozen=True)
class Kind:
    """One kind of layer.

    Attributes:
        make: the layer, for a factor by which it is larger than the smallest.
        inputs: seeded inputs of the layer.
        matrices: a stored weight as the matrices (out, in) that LoRA adapts, which share its memory.
        weights: the name of each adapted weight in the report, and the name of its parameter in the model.
        settings: what selects the layer in a ``LoraConfig``.
        groups: of a convolution. They share the rank.
        memory_format: of the layer's parameters.
        wide: the factor at which the engine iterates.
        merges: whether PEFT merges adapters of such a layer.
        options: what PEFT's LoRA of such a layer can be combined with, of "dora", "dropout" and "bias".
    """

    make: Callable[[int], nn.Module]
    inputs: Callable[[Any], Tensor]
    matrices: Callable[[Tensor], list[Tensor]] = whole
    weights: Mapping[str, str] = field(default_factory=lambda: {NAME: f"{NAME}.weight"})
    settings: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": [NAME]})
    groups: int = 1
    memory_format: torch.memory_format = torch.preserve_format
    wide: int = 5
    merges: bool = True
    options: tuple[str, ...] = ("dora", "dropout", "bias")


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _features(layer: Any) -> Tensor:
    return _noise(6, layer.in_features)


def _tokens(layer: Any) -> Tensor:
    return torch.randperm(layer.num_embeddings, generator=torch.Generator().manual_seed(7)).reshape(4, -1)


def _images(layer: Any) -> Tensor:
    return _noise(2, layer.in_channels, *(8,) * len(layer.kernel_size))


def _expert_inputs(layer: Any) -> Tensor:
    return _noise(len(layer.down_proj), 5, layer.width)


def _embedding(make: Callable[..., nn.Module], *scale: float) -> Kind:
    def embedding(factor: int) -> nn.Module:
        return make(96 * factor, 40 * factor, 3, *scale)

    return Kind(embedding, _tokens, transposed, options=("dora", "dropout"))


def _conv(make: Callable[..., nn.Module], inputs: int, outputs: int, *args: Any, **options: Any) -> Kind:
    kind = {"wide": 6} | {name: options.pop(name) for name in ("memory_format", "wide") if name in options}
    groups = options.get("groups", 1)

    def conv(factor: int) -> nn.Module:
        return make(inputs * factor, outputs * factor, *args, **options)

    if groups == 1:
        return Kind(conv, _images, flat, **kind)
    # PEFT's DoRA takes norms of another matrix where there are groups
    return Kind(conv, _images, in_groups(groups), groups=groups, merges=False, options=("dropout", "bias"), **kind)


def _stack(experts: int, is_transposed: bool) -> Kind:
    def stack(factor: int) -> nn.Module:
        return Stack(experts, 24 * factor, 32 * factor, is_transposed)

    names = {f"{NAME}.{name}": f"{NAME}.{name}" for name in ("gate_up_proj", "down_proj")}
    matrices = stacked_transposed if is_transposed else stacked
    return Kind(stack, _expert_inputs, matrices, names, {"target_parameters": list(names)}, wide=8, options=())


KINDS: dict[str, Kind] = {
    "Linear": Kind(lambda factor: nn.Linear(36 * factor, 48 * factor), _features),
    "Conv1D": Kind(
        lambda factor: Conv1D(48 * factor, 36 * factor),  # type: ignore[no-untyped-call]
        lambda layer: _noise(6, layer.nx),
        transposed,
        settings={"target_modules": [NAME], "fan_in_fan_out": True},
    ),
    "Embedding": _embedding(nn.Embedding),
    "Embedding, scaled by a buffer": _embedding(Gemma3TextScaledWordEmbedding, 6.3),
    "Embedding, scaled by a number": _embedding(BartScaledWordEmbedding, 0.7),
    "Conv1d": _conv(nn.Conv1d, 10, 32, 3, padding=1),
    "Conv2d 1x1": _conv(nn.Conv2d, 32, 40, 1),
    "Conv2d 3x3": _conv(nn.Conv2d, 8, 32, 3, stride=2, padding=1, bias=False),
    "Conv2d 3x1": _conv(nn.Conv2d, 12, 40, (3, 1), padding="same"),
    "Conv2d, channels last": _conv(nn.Conv2d, 8, 32, 3, padding=1, memory_format=torch.channels_last),
    "Conv2d, 2 groups": _conv(nn.Conv2d, 8, 32, 3, padding=1, groups=2),
    # 4 rows of 9 for each channel
    "Conv2d, depthwise": _conv(nn.Conv2d, 4, 16, 3, padding=1, groups=4, wide=1),
    "Conv3d": _conv(nn.Conv3d, 4, 28, 2, stride=(1, 2, 2), wide=7),
    "MultiheadAttention": Kind(
        lambda factor: nn.MultiheadAttention(32 * factor, 4, batch_first=True),
        lambda layer: _noise(3, 7, layer.embed_dim),
        wide=6,
        weights={NAME: f"{NAME}.in_proj_weight", f"{NAME}.base_layer.out_proj": f"{NAME}.out_proj.weight"},
        options=("dropout",),
    ),
    "parameter": Kind(
        lambda factor: Matrix(36 * factor, 48 * factor),
        lambda layer: _noise(6, layer.table.shape[1]),
        weights={f"{NAME}.table": f"{NAME}.table"},
        settings={"target_parameters": [f"{NAME}.table"]},
        options=(),
    ),
    "stack": _stack(4, is_transposed=False),
    "stack of one": _stack(1, is_transposed=False),
    "stack, transposed": _stack(4, is_transposed=True),
}


class KindConfig(PretrainedConfig):
    """Config of a :class:`KindModel`.

    Args:
        kind: a key of :data:`KINDS`.
        factor: by which the layer is larger than the smallest.
    """

    model_type = "kind"

    def __init__(self, kind: str = "Linear", factor: int = 1, **kwargs: Any) -> None:
        self.kind, self.factor = kind, factor
        super().__init__(**kwargs)


class KindModel(PreTrainedModel):
    """A layer of one kind, in a model that transformers can save and load."""

    config_class = KindConfig

    def __init__(self, config: KindConfig) -> None:
        super().__init__(config)
        self.layer = KINDS[config.kind].make(config.factor)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Gemma3TextScaledWordEmbedding):  # the buffer is in no file
            module.embed_scale.fill_(module.scalar_embed_scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer makes of the inputs."""
        if isinstance(getattr(self.layer, "base_layer", self.layer), nn.MultiheadAttention):
            return self.layer(inputs, inputs, inputs, need_weights=False)[0]  # type: ignore[no-any-return]
        return self.layer(inputs)  # type: ignore[no-any-return]


def build(name: str, dtype: torch.dtype = torch.float32, factor: int = 1) -> KindModel:
    """The model of a kind; its matrices have the spectrum of a trained weight, and every bias is large enough to count.

    Args:
        name: a key of :data:`KINDS`.
        dtype: of the parameters.
        factor: by which the layer is larger than the smallest.
    """
    kind = KINDS[name]
    model = KindModel(KindConfig(kind=name, factor=factor))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for weight in kind.weights.values():
            for index, matrix in enumerate(kind.matrices(model.get_parameter(weight).data)):
                shaped = realistic(*matrix.shape, seed=index)
                # the scale of trained projections of this width
                matrix.copy_(shaped * (matrix.shape[1] ** -0.5 / shaped.std()))
    return model.to(dtype=dtype, memory_format=kind.memory_format).eval()


def inputs_of(name: str, model: Any) -> Tensor:
    """Seeded inputs of a base model, in its dtype."""
    x = KINDS[name].inputs(model.layer)
    return x.to(model.dtype) if x.is_floating_point() else x


def lora_config(name: str, rank: int = 4, **changes: Any) -> Any:
    """A PiSSA config of the kind.

    Args:
        name: a key of :data:`KINDS`.
        rank: rank for each matrix, where the groups of a convolution share the adapter's.
        changes: other arguments of ``LoraConfig``.
    """
    import peft

    kind = KINDS[name]
    r = rank * kind.groups
    settings = {"r": r, "lora_alpha": 2 * r, "init_lora_weights": "pissa", **kind.settings}
    return peft.LoraConfig(**(settings | changes))
