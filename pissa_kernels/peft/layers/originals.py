"""The original weights of a quantized model, read from its 16-bit checkpoint one at a time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ...files.folder import INDEX, SINGLE, open_checkpoint
from ...files.header import TensorInfo, read_header, read_tensor
from ..weights.quantized import shape_of, values_of

DEQUANTIZED = "dequantized"


class Originals(Protocol):
    """Where the weights of quantized layers come from."""

    def check(self, model: nn.Module | None, name: str | None, base: Any) -> None:
        """Refuse a module whose original weight cannot be read, without reading it. As for :meth:`weight`."""

    def weight(self, model: nn.Module | None, name: str | None, base: Any) -> Tensor:
        """The original weight (out, in) of one module, on the CPU or on the module's device.

        Args:
            model: the model that PEFT adapts; None where it is not known.
            name: name of the module in it; None where it is not known.
            base: the module.

        Raises:
            ValueError, OSError: there is none; the message says what was found.
        """


class Dequantized:
    """The dequantized weight is taken for the original one."""

    def check(self, model: nn.Module | None, name: str | None, base: Any) -> None:
        """There always is one."""

    def weight(self, model: nn.Module | None, name: str | None, base: Any) -> Tensor:
        """The values that the module computes with."""
        return values_of(base)


class CheckpointWeights:
    """The weights in the safetensors of a folder.

    Args:
        folder: a checkpoint as transformers saves it, or a folder with safetensors whose tensors have the names of the
            model's parameters.

    Raises:
        FileNotFoundError: the folder has no safetensors.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = _tensors(folder)
        self._mapped: tuple[weakref.ref[nn.Module], Mapping[str, list[str]]] | None = None

    def check(self, model: nn.Module | None, name: str | None, base: Any) -> None:
        """Refuse a module for which there is no tensor, or one of another shape."""
        self._place(model, name, base)

    def weight(self, model: nn.Module | None, name: str | None, base: Any) -> Tensor:
        """The tensor that transformers loads as the weight of the module."""
        shard, info = self._place(model, name, base)
        with (self.folder / shard).open("rb") as file:
            weight = read_tensor(file.fileno(), info)
        return weight.mT if _is_transposed(base) else weight

    def _place(self, model: nn.Module | None, name: str | None, base: Any) -> tuple[str, TensorInfo]:
        keys = self._keys(model, f"{name}.weight")
        if len(keys) != 1:
            raise ValueError(
                f"{self.folder} has no tensor of its own for the weight"
                + (f"; it is made of {', '.join(map(repr, keys[:3]))}" if keys else "")
                + ". Pass the folder of the checkpoint that the model was quantized from"
            )
        shard, info = self._tensors[keys[0]]
        expected = shape_of(base)
        if info.shape != (expected[::-1] if _is_transposed(base) else expected):
            raise ValueError(
                f"{self.folder} has a weight {info.shape} for it, tensor {keys[0]!r}, and the quantized one is "
                f"{expected}. Pass the checkpoint that the model was quantized from"
            )
        return shard, info

    def _keys(self, model: nn.Module | None, parameter: str) -> list[str]:
        if parameter in self._tensors:
            return [parameter]
        if model is None or not hasattr(model, "base_model_prefix"):
            return []
        if self._mapped is None or self._mapped[0]() is not model:
            self._mapped = weakref.ref(model), _mapped(model, list(self._tensors))
        return list(self._mapped[1].get(parameter, ()))


def _is_transposed(base: Any) -> bool:
    """Whether the weight was that of transformers' ``Conv1D``, which is stored (in, out), before it was quantized."""
    return getattr(getattr(base, "source_cls", None), "__name__", "") == "Conv1D"


def open_originals(original: str | os.PathLike[str]) -> Originals:
    """The source that ``patch_peft(original=…)`` names.

    Args:
        original: a folder, the name of a repository whose snapshot is in the local cache of the hub, or "dequantized".

    Raises:
        FileNotFoundError: neither a folder nor a snapshot in the cache, or no safetensors there.
        ValueError: a file is damaged.
    """
    if original == DEQUANTIZED:
        return Dequantized()
    folder = Path(original)
    if not folder.is_dir():
        folder = _snapshot(os.fspath(original))
    return CheckpointWeights(folder)


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        raise FileNotFoundError(
            f"original={name!r} is neither a folder nor a model in the local cache of the hub. Pass the folder of the "
            f"16-bit checkpoint that the model was quantized from, or {DEQUANTIZED!r} to decompose the dequantized "
            "weights"
        ) from None


def _tensors(folder: Path) -> dict[str, tuple[str, TensorInfo]]:
    """File and place of every tensor, by its key."""
    if (folder / "config.json").is_file() and any((folder / name).exists() for name in (SINGLE, INDEX)):
        return open_checkpoint(folder).tensors()
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"original={os.fspath(folder)!r} holds no safetensors, from which a weight is read alone"
        )
    return {key: (name, info) for name in files for key, info in read_header(folder / name).tensors.items()}


def _mapped(model: Any, keys: list[str]) -> dict[str, list[str]]:
    """Keys of the tensors that transformers loads into each parameter of a model, by its name without adapters."""
    from ...adapter.tensors import tensors_of_parameters
    from ..weights.wrappers import own_names

    named = own_names(model)
    parameters = {own: value for name, value in model.named_parameters() if (own := named(name)) is not None}
    plain, transformed = tensors_of_parameters(model, keys, parameters)
    return {**plain, **transformed}
