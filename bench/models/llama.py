"""Llama-shaped models whose projections have the spectra of real weights."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.dtypes import DTYPES
from ..initializers.spectra import synthetic_weight

# The MiniLM linear layer that has the spectrum of each projection.
SPECTRA = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "gate_proj": "intermediate.dense",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
}
HELP = {
    "layers": "decoder layers",
    "width": "hidden size",
    "inner": "intermediate size",
    "groups": "query heads, of size 64, per key head",
    "rank": "rank of the adapter",
    "dtype": "dtype of the weights: " + ", ".join(DTYPES),
    "distinct": "layers with different weights, which the further layers repeat; 0 for all",
}


@dataclass(frozen=True)
class ModelCase:
    """A Llama-shaped model and the rank of its adapter.

    Attributes:
        layers: number of decoder layers.
        width: hidden size.
        inner: intermediate size, between gate and down projection.
        groups: number of query heads, of size 64, per key head.
        rank: r.
        dtype: dtype of the weights: "bf16", "fp16" or "fp32".
        distinct: number of layers with different weights, which the further layers repeat; 0 for all layers.
    """

    layers: int = 22
    width: int = 2048
    inner: int = 5632
    groups: int = 8
    rank: int = 16
    dtype: str = "bf16"
    distinct: int = 0

    @property
    def name(self) -> str:
        return f"llama-{self.layers}x{self.width}x{self.inner}-r{self.rank}-{self.dtype}"

    def empty(self) -> Any:
        """The model on the meta device."""
        import transformers

        config = transformers.LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            num_key_value_heads=self.width // (64 * self.groups),
            vocab_size=32000,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(config).to(DTYPES[self.dtype])

    def build(self) -> Any:
        """The model on the CPU. Embeddings and norms are zeros, because nothing reads them."""
        model = self.empty()
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.zero_()
        return model

    def fill(self, model: Any) -> None:
        """Set the weights of all projections."""
        modules = targets(model)
        own = self.distinct * len(SPECTRA) or len(modules)
        for index, (name, module) in enumerate(modules):
            if index >= own:
                module.weight.data.copy_(modules[index % own][1].weight.data)
                continue
            module.weight.data.copy_(self.weight(index, name, (module.out_features, module.in_features)))

    def weight(self, index: int, name: str, shape: tuple[int, int]) -> Tensor:
        """The float32 weight of one projection.

        Args:
            index: position in :func:`targets`.
            name: name of the module.
            shape: (out, in).
        """
        depth, projection = int(name.split(".")[2]), name.rpartition(".")[2]
        source = f"encoder.layer.{depth % 6}.{SPECTRA[projection]}.weight"
        return synthetic_weight(shape, "real-like", source=source, seed=index)


def targets(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Names and modules of all projections."""
    return [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in SPECTRA]


class Base:
    """A base model for all providers, and a copy of its original weights."""

    def __init__(self, case: ModelCase) -> None:
        self.case = case
        self.model = case.build()
        case.fill(self.model)
        self.pristine = {name: module.weight.data.clone() for name, module in targets(self.model)}
        self.adapted: Any = None

    def restore(self, device: str) -> None:
        """Remove the adapter and restore the original weights, on ``device``."""
        if self.adapted is not None:
            self.adapted.unload()
            self.adapted = None
        for name, module in targets(self.model):
            if module.weight.device.type == device:
                module.weight.data.copy_(self.pristine[name])
            else:
                module.weight.data = self.pristine[name].to(device, copy=True)
        torch.manual_seed(0)  # PEFT draws its sketch from the global generator


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each attribute of a :class:`ModelCase`."""
    for field in dataclasses.fields(ModelCase):
        text = field.name == "dtype"
        parser.add_argument(
            f"--{field.name}",
            type=str if text else int,
            default=field.default,
            metavar="DTYPE" if text else "N",
            help=f"{HELP[field.name]} (default: {field.default})",
        )


def case_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> ModelCase:
    """The case that the options describe; calls ``parser.error`` for one that cannot be built."""
    case = ModelCase(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ModelCase)})
    if case.dtype not in DTYPES:
        parser.error(f"--dtype must be one of {', '.join(DTYPES)}")
    if min(case.layers, case.inner, case.groups, case.rank) < 1 or case.distinct < 0:
        parser.error("--layers, --inner, --groups and --rank must be at least 1, --distinct at least 0")
    if case.width < 64 * case.groups or case.width % (64 * case.groups):
        parser.error(f"--width must be a multiple of {64 * case.groups}: heads of size 64, {case.groups} per key head")
    return case
