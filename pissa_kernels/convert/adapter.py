"""A LoRA adapter on disk: its config, and where its file has the factors of each layer. No factor is read here."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from ..adapter.names import ADAPTER_FOLDER, CONFIG_NAME, KEY_PREFIX, WEIGHTS_NAME, factor_key, module_name
from ..adapter.wrapped import Known
from ..checkpoint.manifest import MANIFEST, Manifest
from ..checks import layer_context
from ..files.header import Header, TensorInfo, read_header, read_tensor
from ..peft.saving import sidecar
from ..report import REPORT_NAME, Report
from ..report.strict import load
from .layer import Layer, read_layers, recorded_layer

_FACTOR = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
_MALFORMED_FACTOR = re.compile(r"\.lora_(A|B|embedding_[AB])\.(?!bias$)")
# Settings under which a layer computes more than W + s·B·A, or not for every token.
_UNSUPPORTED_SETTINGS = (
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
    *("monteclora_config", "kasa_config", "velora_config"),
)
# Larger numbers do not fit the float32 arithmetic of a layer.
_LARGEST_ALPHA = 1e30


@dataclass(frozen=True)
class AdapterFile:
    """A safetensors file with the factors of an adapter.

    Attributes:
        path: the file.
        config: config of the adapter; empty for a ``pissa_initial.safetensors``, which has none.
        layers: factors by the layer's name in the base model, as in :func:`pissa_kernels.convert.layer.read_layers`.
        others: tensors that are not factors, in the file's order.
        base_weights: weights of these layers' base layers, which PEFT saves of an adapted head or embedding. With PiSSA
            they are residuals.
        known: what this file, and those beside it, say of adapted parameters.
    """

    path: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]
    others: tuple[TensorInfo, ...]
    base_weights: tuple[TensorInfo, ...] = ()
    known: Known | None = None


def read_adapter(folder: Path, known: Known | None = None) -> AdapterFile:
    """Read the config and the header of a LoRA adapter that PEFT saved.

    Args:
        folder: folder of the adapter.
        known: what other files say of adapted parameters.

    Raises:
        FileNotFoundError: the folder, the config or the weights do not exist.
        ValueError: a file is damaged, the adapter is not a LoRA or has an unsupported setting, or its weights do not
            match its config; the message names the file and the layer.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}; save the adapter with safe_serialization=True")
    factors: dict[str, dict[str, TensorInfo]] = {}
    others = []
    for info in read_header(path).tensors.values():
        match = _FACTOR.fullmatch(info.name)
        if match and match["layer"].startswith(KEY_PREFIX):
            factors.setdefault(module_name(match["layer"]), {})[match["linear"] or match["embedding"]] = info
        elif match or _MALFORMED_FACTOR.search(info.name):
            raise ValueError(f"{path}: PEFT saves no factor under the key {info.name!r}; save the adapter with PEFT")
        else:
            others.append(info)
    if not factors:
        raise ValueError(f"{path} has no LoRA factors; accepted are keys that end in .lora_A.weight and .lora_B.weight")
    layers = read_layers(factors, config, known, path)
    names = {f"{layer.path}.base_layer.weight" for layer in layers.values()}
    base_weights = tuple(info for info in others if module_name(info.name) in names)
    others = [info for info in others if info not in base_weights]
    return AdapterFile(path, config, layers, tuple(others), base_weights, known)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a LoRA adapter, and check the entries that a conversion uses.

    Raises:
        FileNotFoundError: the folder or the config does not exist.
        ValueError: the config is damaged, is not of a LoRA, or has an unsupported setting.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {CONFIG_NAME}")
    try:
        config = load(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path} is not the config of a LoRA: its peft_type is {kind!r}, accepted is 'LORA'")
    ranks = [config.get("r"), *_pattern_values(path, config, "rank_pattern")]
    alphas = [config.get("lora_alpha"), *_pattern_values(path, config, "alpha_pattern")]
    if any(type(rank) is not int or rank < 1 for rank in ranks):
        raise ValueError(f"{path} has the ranks {ranks}; accepted are integers ≥ 1")
    if not all(type(alpha) in (int, float) and abs(alpha) <= _LARGEST_ALPHA for alpha in alphas):
        raise ValueError(f"{path} has the alphas {alphas}; accepted are numbers")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if not (isinstance(config.get(key), (str, NoneType)) or _are_strings(config[key])):
            raise ValueError(f"{path} has the {key} {config[key]!r}; accepted is a string or a list of strings")
    if (parameters := config.get("target_parameters")) is not None and not _are_strings(parameters):
        raise ValueError(f"{path} has the target_parameters {parameters!r}; accepted is a list of strings")
    if not isinstance(name := config.get("base_model_name_or_path"), (str, NoneType)):
        raise ValueError(f"{path} has the base_model_name_or_path {name!r}; accepted is a string")
    if setting := next((key for key in _UNSUPPORTED_SETTINGS if config.get(key)), None):
        raise ValueError(f"{path} sets {setting}, so the adapter is more than two factors per layer; use it with PEFT")
    return config


def find_initial(folder: Path) -> AdapterFile:
    """Find the initial factors in a folder.

    Args:
        folder: a folder with ``pissa_initial.safetensors`` (beside a trained adapter), with ``pissa_init/`` (in a
            residual checkpoint), or with the initial adapter itself.

    Raises:
        FileNotFoundError: the folder holds none of these.
        ValueError: the initial factors are damaged.
    """
    if (folder / sidecar.INITIAL_NAME).is_file():
        return _read_sidecar(folder / sidecar.INITIAL_NAME)
    # pissa_init/ first: an adapter beside a residual model may be the trained one
    inside = folder / ADAPTER_FOLDER
    found = inside if (inside / CONFIG_NAME).is_file() else folder
    if not (found / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no initial adapter; accepted are {sidecar.INITIAL_NAME}, {ADAPTER_FOLDER}/ or {CONFIG_NAME}"
        )
    return read_adapter(found, _known_beside(found))


def _known_beside(folder: Path) -> Known | None:
    """What the report beside an initial adapter, and the checkpoint around it, say of adapted parameters."""
    if not read_config(folder).get("target_parameters"):
        return None
    parent = folder.resolve().parent
    targets = Manifest.read(parent).targets if (parent / MANIFEST).is_file() else {}
    names = {module_name(target["key"]): target["layer"] for target in targets.values() if "key" in target}
    matrices: dict[str, Collection[tuple[int, ...]]] = {}
    for path in sorted(parent.glob("*.safetensors")):
        matrices |= {info.name: _orientations(info.shape) for info in read_header(path).tensors.values()}
    if (folder / REPORT_NAME).is_file():
        matrices |= _matrices(Report.read(folder / REPORT_NAME))
    return Known(names, matrices)


def _orientations(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The (E, out, in) that a parameter of this shape may have."""
    return {(1, *shape)} if len(shape) == 2 else {shape, (*shape[:-2], *shape[:-3:-1])}


def _matrices(report: Report) -> dict[str, Collection[tuple[int, ...]]]:
    return {layer.name: {(max(1, len(layer.parts)), *layer.shape)} for layer in report.layers}


def _read_sidecar(path: Path) -> AdapterFile:
    header = read_header(path)
    layers = {}
    try:
        record = header.metadata["pissa_kernels"]
        report = Report.from_dict(json.loads(record))
        for layer in report.layers:
            with layer_context(f"layer {layer.name!r}"):
                A, B = _recorded(layer.name, header)
                layers[layer.name] = recorded_layer(layer, A, B)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold the initial factors of a PiSSA adapter: {error}") from None
    with path.open("rb") as file:
        digest = sidecar.digest(record, _Tensors(file.fileno(), header))
    if header.metadata.get("sha256") != digest:
        raise ValueError(f"{path} is damaged: its contents do not match the hash in its header")
    return AdapterFile(path, {}, layers, (), known=_known_in(report))


def _known_in(report: Report) -> Known:
    """What the report of a ``pissa_initial.safetensors`` says, whose layers are in the order of PEFT's modules."""
    return Known(matrices=_matrices(report), order=[layer.name for layer in report.layers])


def _recorded(name: str, header: Header) -> tuple[TensorInfo, TensorInfo]:
    """Places of A and B, of which an embedding's have other keys."""
    keys = [factor_key(name, factor) for factor in "AB"]
    if keys[0] not in header.tensors:
        embedding = [f"{KEY_PREFIX}{name}.lora_embedding_{factor}" for factor in "AB"]
        keys = embedding if embedding[0] in header.tensors else keys
    A, B = (header.tensors[key] for key in keys)
    return A, B


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open file, read one at a time: each lookup reads its tensor, and keeps nothing."""

    def __init__(self, descriptor: int, header: Header) -> None:
        self._descriptor, self._infos = descriptor, header.tensors

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._descriptor, self._infos[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def _pattern_values(path: Path, config: Mapping[str, Any], key: str) -> list[Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{path} has the {key} {pattern!r}; accepted is an object")
    return list(pattern.values())


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
