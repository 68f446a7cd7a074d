"""The tensors of a checkpoint that an adapter changes, found by the names of their layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..adapter.names import module_name
from ..adapter.wrapped import Known
from ..checkpoint.classes import loading_of, tensors_of_parameters
from ..checkpoint.experts import find_stack
from ..checkpoint.manifest import Manifest
from ..checkpoint.model import empty_model, tied_weights
from ..checks import layer_context
from ..convert.adapter import AdapterFile, read_adapter, read_config
from ..convert.pieces import Piece, check_complete, pieces_of
from ..factors import Recipe
from ..files.folder import Checkpoint
from ..files.header import TensorInfo, plan_header

# A merge decomposes nothing.
_NO_RECIPE = Recipe(rank=1, scaling=1.0, init="pissa", seed=0)


@dataclass(frozen=True)
class Place:
    """What an adapter does to one tensor.

    Attributes:
        layer: name of the layer whose product is added to it; None for none.
        copy: a trained copy of the tensor; None if there is none.
        transposed: whether the 16-bit tensor is stored (in, out).
        piece: which matrices of a stack it has; None for a weight that is one matrix.
    """

    layer: str | None = None
    copy: TensorInfo | None = None
    transposed: bool = False
    piece: Piece | None = None


def read_trained(trained: Path, manifest: Manifest | None, names: ModelNames) -> AdapterFile:
    """The adapter, with the names of the parameters that it adapts.

    The manifest has those of a residual checkpoint. Elsewhere, the model tells in which order a module has registered
    its parameters, and so which of PEFT's wrappers is which.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError, ValueError: the adapter is damaged or not supported, or there is no model of the checkpoint.
    """
    if not read_config(trained).get("target_parameters"):
        return read_adapter(trained)
    targets = {} if manifest is None else manifest.targets
    known = Known({module_name(about["key"]): about["layer"] for about in targets.values() if "key" in about})
    if known.names:
        adapter = read_adapter(trained, known)
        if all(layer.weight for layer in adapter.layers.values()):
            return adapter
    return read_adapter(trained, replace(known, order=names.order))


def find_places(adapter: AdapterFile, manifest: Manifest | None, names: ModelNames) -> dict[str, Place]:
    """The tensors that an adapter changes, and all weights that a quantized model stores (in, out), by key.

    The manifest of a residual checkpoint names them. Elsewhere, and for layers that ``init`` left alone, a model on the
    meta device does.

    Args:
        adapter: the adapter.
        manifest: the checkpoint's manifest, if it has one.
        names: the tensors of the checkpoint's model.

    Raises:
        ValueError: a layer or a trained copy has no tensor of its own, or a stack lacks rows.
    """
    targets = {key: about for key, about in ({} if manifest is None else manifest.targets).items() if key in names}
    stacks = pieces_of(targets)
    known = {about["layer"]: key for key, about in targets.items() if about["layer"] not in stacks}
    places: dict[str, Place] = {}
    for name in stacks.keys() & adapter.layers.keys():
        places |= _of_stack(name, adapter, stacks[name])
    others = [name for name in adapter.layers if name not in stacks]
    if not names.quantized and known.keys() >= set(others) and not _copies(adapter):
        return places | {
            known[name]: Place(layer=name, transposed=bool(targets[known[name]]["transposed"])) for name in others
        }
    places = ({key: Place(transposed=True) for key in names.transposed} if names.quantized else {}) | places
    for info in _copies(adapter):
        parameter = module_name(info.name).replace(".base_layer.", ".")
        key = names.key(parameter, f"{adapter.path}: {info.name!r}")
        places[key] = replace(places.get(key, Place()), copy=info)
    for name in others:
        layer, what = adapter.layers[name], f"layer {name!r} of {adapter.path.parent}"
        if layer.wrapped:
            places |= _of_stack(name, adapter, names.pieces(layer.weight, what))
            continue
        key = names.key(layer.weight, what)
        transposed = layer.embedding or key in names.transposed
        places[key] = replace(places.get(key, Place()), layer=name, transposed=transposed)
    return places


def _of_stack(name: str, adapter: AdapterFile, pieces: list[Piece]) -> dict[str, Place]:
    """The places of a stack, which has every row of every matrix once."""
    with layer_context(f"layer {name!r} of {adapter.path.parent}"):
        check_complete(pieces, adapter.layers[name])
    return {piece.key: Place(layer=name, transposed=piece.transposed, piece=piece) for piece in pieces}


def _copies(adapter: AdapterFile) -> tuple[TensorInfo, ...]:
    """Trained copies of tensors: of modules_to_save, embeddings that were saved too, and biases."""
    return (*adapter.others, *adapter.base_weights)


class ModelNames:
    """The tensors of a checkpoint by the parameters of its model, which is built when it is first asked for.

    Args:
        checkpoint: the checkpoint.
        entries: dtype and shape of its tensors once they are dequantized.
        quantized: whether the checkpoint has quantized weights, which are all stored (out, in).
        remote_code: whether to run the Python code that comes with the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        quantized: bool,
        remote_code: bool,
    ) -> None:
        self.quantized = quantized
        self._folder, self._entries, self._remote_code = checkpoint.folder, entries, remote_code
        # transformers maps the keys of a 16-bit model
        header = plan_header((key, *entry) for key, entry in entries.items())
        self._checkpoint = replace(checkpoint, shards={next(iter(checkpoint.shards)): header})

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @functools.cached_property
    def _model(self) -> Any:
        return empty_model(self._checkpoint, self._remote_code, self.quantized)

    @functools.cached_property
    def _prefix(self) -> str:
        return f"{self._model.base_model_prefix}."

    @functools.cached_property
    def _tied(self) -> dict[str, str]:
        return tied_weights(self._model)

    @functools.cached_property
    def _tensors(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        return tensors_of_parameters(self._model, self._checkpoint)

    @functools.cached_property
    def transposed(self) -> set[str]:
        """Keys of weights of ``Conv1D``, which the model stores (in, out)."""
        from transformers.pytorch_utils import Conv1D

        modules = self._model.named_modules()
        weights = [f"{name}.weight" for name, module in modules if isinstance(module, Conv1D)]
        return {key for weight in weights for key in self._tensors[0].get(weight, ())}

    @functools.cached_property
    def order(self) -> list[str]:
        """The parameters of every module, the last one first, as PEFT nests their wrappers.

        Their names are also those in a model that lacks the head of the checkpoint's, or has one that it lacks.
        """
        names = [
            f"{name}.{parameter}"
            for name, module in self._model.named_modules()
            for parameter in reversed([parameter for parameter, _ in module.named_parameters(recurse=False)])
        ]
        inside = [name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)]
        return list(dict.fromkeys([*names, *inside, *(self._prefix + name for name in names)]))

    def pieces(self, parameter: str, what: str) -> list[Piece]:
        """Where the checkpoint has the matrices of a stack.

        Args:
            parameter: its name in the model that was trained.
            what: what it is, for messages.

        Raises:
            ValueError: it is made of the tensors in a way that cannot be undone.
        """
        name = self._parameter(parameter)
        plain, transformed = self._tensors
        value = None if name is None else self._model.get_parameter(name)
        if name is None or value is None or value.ndim != 3 or name not in {*plain, *transformed}:
            return [Piece(self.key(parameter, what), transposed=False, expert=0)]
        loading = loading_of(self._model, self._checkpoint)
        conversion = loading.conversions.get(name)
        module = self._model.get_submodule(name.rpartition(".")[0])
        try:
            stack = find_stack(
                name, "", _Wrapped(value, module), _NO_RECIPE, loading.tensors, plain.get(name, ()), conversion
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}: its tensors in {self._folder} cannot be merged one by one ({error})") from None
        if stack.fused:
            return [Piece(stack.pieces[0][0].info.name, stack.transposed)]
        return [
            Piece(piece.info.name, stack.transposed, expert.index, piece.rows)
            for expert in stack.experts
            for piece in expert.pieces
        ]

    def _parameter(self, parameter: str) -> str | None:
        """Name of a parameter in the checkpoint's model."""
        names = dict(self._model.named_parameters())
        return next((name for name in self._names(parameter) if name in names), None)

    def _names(self, parameter: str) -> dict[str, None]:
        """Names that a parameter of the model that was trained may have in the checkpoint's."""
        return dict.fromkeys((parameter, self._prefix + parameter, parameter.removeprefix(self._prefix)))

    def key(self, parameter: str, what: str) -> str:
        """Key of the tensor that a parameter is loaded from.

        Args:
            parameter: its name in the model that was trained, which may lack the head of the checkpoint's.
            what: what it is, for messages.
        """
        plain, transformed = self._tensors
        for name in self._names(parameter):
            module = name.removesuffix(".weight")
            if module in self._tied and name.endswith(".weight"):
                raise ValueError(
                    f"{what}: the weight is tied to {self._tied[module]}, which would change with it; save the model "
                    "untied (config.tie_word_embeddings = False), or merge with PEFT"
                )
            if name in transformed or len(plain.get(name, ())) > 1:
                raise ValueError(
                    f"{what}: its weight is not a tensor of its own in {self._folder}; merge with PEFT "
                    "(merge_and_unload)"
                )
            if name in plain:
                return plain[name][0]
        raise ValueError(
            f"{what}: {self._folder} has no such tensor; give the checkpoint that the adapter was trained on"
        )


class _Wrapped(NamedTuple):
    """What :func:`find_stack` asks PEFT's wrapper of a parameter."""

    parameter: Any
    module: Any

    def get_param(self) -> Any:
        return self.parameter

    def get_base_layer(self) -> Any:
        return self.module
