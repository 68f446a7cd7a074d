"""The tensors of a checkpoint that an adapter changes, found by the names of their layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..adapter.names import module_name
from ..checkpoint.classes import tensors_of_parameters
from ..checkpoint.manifest import Manifest
from ..checkpoint.model import empty_model, tied_weights
from ..convert.adapter import AdapterFile
from ..files.folder import Checkpoint
from ..files.header import TensorInfo, plan_header


@dataclass(frozen=True)
class Place:
    """What an adapter does to one tensor.

    Attributes:
        layer: name of the layer whose product is added to it; None for none.
        copy: a trained copy of the tensor; None if there is none.
        transposed: whether the 16-bit tensor is stored (in, out).
    """

    layer: str | None = None
    copy: TensorInfo | None = None
    transposed: bool = False


def find_places(
    checkpoint: Checkpoint,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    adapter: AdapterFile,
    manifest: Manifest | None,
    *,
    quantized: bool,
    remote_code: bool,
) -> dict[str, Place]:
    """The tensors that an adapter changes, and with ``quantized`` all weights that the model stores (in, out), by key.

    The manifest of a residual checkpoint names them. Elsewhere, and for layers that ``init`` left alone, a model on the
    meta device does.

    Args:
        checkpoint: the checkpoint.
        entries: dtype and shape of its tensors once they are dequantized.
        adapter: the adapter.
        manifest: the checkpoint's manifest, if it has one.
        quantized: whether the checkpoint has quantized weights, which are all stored (out, in).
        remote_code: whether to run the Python code that comes with the checkpoint.

    Raises:
        ValueError: a layer or a trained copy has no tensor of its own.
    """
    targets = {} if manifest is None else manifest.targets
    known = {about["layer"]: key for key, about in targets.items() if key in entries}
    if not quantized and adapter.layers.keys() <= known.keys() and not _copies(adapter):
        return {
            known[name]: Place(layer=name, transposed=bool(targets[known[name]]["transposed"]))
            for name in adapter.layers
        }
    names = _Names(checkpoint, entries, quantized, remote_code)
    places = {key: Place(transposed=True) for key in names.transposed} if quantized else {}
    for info in _copies(adapter):
        parameter = module_name(info.name).replace(".base_layer.", ".")
        key = names.key(parameter, f"{adapter.path}: {info.name!r}")
        places[key] = replace(places.get(key, Place()), copy=info)
    for name, layer in adapter.layers.items():
        key = names.key(f"{name}.weight", f"layer {name!r} of {adapter.path.parent}")
        transposed = layer.embedding or key in names.transposed
        places[key] = replace(places.get(key, Place()), layer=name, transposed=transposed)
    return places


def _copies(adapter: AdapterFile) -> tuple[TensorInfo, ...]:
    """Trained copies of tensors: of modules_to_save, embeddings that were saved too, and biases."""
    return (*adapter.others, *adapter.base_weights)


class _Names:
    """The tensors of a checkpoint by the parameters of its model.

    Attributes:
        transposed: keys of weights of ``Conv1D``, which the model stores (in, out).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        quantized: bool,
        remote_code: bool,
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        self._folder = checkpoint.folder
        # transformers maps the keys of a 16-bit model
        header = plan_header((key, *entry) for key, entry in entries.items())
        plain = replace(checkpoint, shards={next(iter(checkpoint.shards)): header})
        model = empty_model(plain, remote_code, quantized)
        self._prefix = f"{model.base_model_prefix}."
        self._tied: Mapping[str, str] = tied_weights(model)
        self._plain, self._transformed = tensors_of_parameters(model, plain)
        weights = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)]
        self.transposed = {key for weight in weights for key in self._plain.get(weight, ())}

    def key(self, parameter: str, what: str) -> str:
        """Key of the tensor that a parameter is loaded from.

        Args:
            parameter: its name in the model that was trained, which may lack the head of the checkpoint's.
            what: what it is, for messages.
        """
        candidates = (parameter, self._prefix + parameter, parameter.removeprefix(self._prefix))
        for name in dict.fromkeys(candidates):
            module = name.removesuffix(".weight")
            if module in self._tied and name.endswith(".weight"):
                raise ValueError(
                    f"{what}: the weight is tied to {self._tied[module]}, which would change with it; save the model "
                    "untied (config.tie_word_embeddings = False), or merge with PEFT"
                )
            if name in self._transformed or len(self._plain.get(name, ())) > 1:
                raise ValueError(
                    f"{what}: its weight is not a tensor of its own in {self._folder}; merge with PEFT "
                    "(merge_and_unload)"
                )
            if name in self._plain:
                return self._plain[name][0]
        raise ValueError(
            f"{what}: {self._folder} has no such tensor; give the checkpoint that the adapter was trained on"
        )
