"""An adapter as it lies on the disk: its config, and where each layer's factors are, which are not read here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.names import ADAPTER_FOLDER, CONFIG_NAME, WEIGHTS_NAME, factor_key, module_name
from ..adapter.patterns import rank_of, scaling_of
from ..files.header import DTYPES, Header, TensorInfo, read_header, read_tensor
from ..peft import sidecar
from ..report import Report

_FACTOR = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
# What makes an adapter more, or less, than W + s·B·A in every layer and for every token.
_OTHER_FORMS = (
    *("target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "monteclora_config", "kasa_config", "velora_config"),
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Layer:
    """One layer's factors.

    Attributes:
        A, B: entries of (r, in) and (out, r).
        rank: r.
        scaling: s.
        transposed: the weight is (in, out): Conv1D by the config, or an embedding.
    """

    A: TensorInfo
    B: TensorInfo
    rank: int
    scaling: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """One that holds both factors."""
        return torch.promote_types(DTYPES[self.A.dtype], DTYPES[self.B.dtype])


@dataclass(frozen=True)
class AdapterFile:
    """A safetensors file with the factors of an adapter.

    Attributes:
        path: of the file.
        config: of its folder; empty for the initial factors beside a trained adapter.
        layers: by the module's name in the base model.
        others: the tensors that are no factors, in the file's order.
    """

    path: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]
    others: tuple[TensorInfo, ...]


def read_adapter(folder: Path) -> AdapterFile:
    """The LoRA adapter in a folder, as PEFT saves it.

    Raises:
        FileNotFoundError: no folder, config or weights.
        ValueError: it is damaged, no LoRA, of a form that is more than two factors, or its weights are not those that
            its config describes; the message names the file and the layer.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_NAME}; a .bin is not read, save with safe_serialization=True"
        )
    header = read_header(path)
    embeddings: set[str] = set()
    factors: dict[str, dict[str, TensorInfo]] = {}
    others = []
    for entry in header.tensors.values():
        if (match := _FACTOR.fullmatch(entry.name)) is None:
            others.append(entry)
            continue
        name = module_name(match["layer"])
        factors.setdefault(name, {})[match["linear"] or match["embedding"]] = entry
        if match["embedding"]:
            embeddings.add(name)
    for entry in others:
        if re.search(r"\.lora_(A|B|embedding_[AB])\.(?!bias$)", entry.name):
            raise ValueError(f"{path}: {entry.name!r} is no key of an adapter that PEFT saved")
    if not factors:
        raise ValueError(f"{path} holds no LoRA factors; accepted are keys that end in .lora_A.weight, .lora_B.weight")
    layers = {}
    for name, pair in factors.items():
        if len(pair) != 2:
            raise ValueError(f"{path}: layer {name!r} has no lora_{'B' if 'A' in pair else 'A'}")
        _check_pair(path, name, pair["A"], pair["B"], rank_of(config, name))
        layers[name] = Layer(
            A=pair["A"],
            B=pair["B"],
            rank=rank_of(config, name),
            scaling=scaling_of(config, name),
            transposed=name in embeddings or bool(config.get("fan_in_fan_out")),
        )
    return AdapterFile(path, config, layers, tuple(others))


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the LoRA adapter in a folder, with what is needed of it in a usable form.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or describes something else.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no adapter's folder: it has no {CONFIG_NAME}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path} is not of a LoRA adapter: its peft_type is {kind!r}, accepted is 'LORA'")
    ranks = [config.get("r"), *_values(path, config, "rank_pattern")]
    alphas = [config.get("lora_alpha"), *_values(path, config, "alpha_pattern")]
    if any(type(rank) is not int or rank < 1 for rank in ranks):
        raise ValueError(f"{path} has the ranks {ranks}; accepted are integers ≥ 1")
    if any(type(alpha) not in (int, float) for alpha in alphas):
        raise ValueError(f"{path} has the alphas {alphas}; accepted are numbers")
    if form := next((key for key in _OTHER_FORMS if config.get(key)), None):
        raise ValueError(f"{path} sets {form}, which is more than the two factors of a plain LoRA can say")
    return config


def find_initial(folder: Path) -> AdapterFile:
    """The initial factors that a folder holds: beside a trained adapter, in ``pissa_init/``, or as an adapter itself.

    Raises:
        FileNotFoundError: none of these.
        ValueError: they are damaged.
    """
    if (folder / sidecar.INITIAL_NAME).is_file():
        return _read_sidecar(folder / sidecar.INITIAL_NAME)
    # before the folder's own, which is a trained one when it lies beside a residual model
    if (folder / ADAPTER_FOLDER / CONFIG_NAME).is_file():
        return read_adapter(folder / ADAPTER_FOLDER)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} holds no initial adapter; accepted are {sidecar.INITIAL_NAME}, {ADAPTER_FOLDER}/ or "
            f"{CONFIG_NAME}"
        )
    return read_adapter(folder)


def _read_sidecar(path: Path) -> AdapterFile:
    header = read_header(path)
    try:
        record = header.metadata["pissa_kernels"]
        report = Report.from_dict(json.loads(record))
        layers = {}
        for layer in report.layers:
            A, B = (header.tensors[factor_key(layer.name, factor)] for factor in "AB")
            _check_pair(path, layer.name, A, B, layer.rank)
            layers[layer.name] = Layer(A, B, layer.rank, layer.scaling, transposed=False)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold the initial factors of a PiSSA adapter: {error}") from None
    with path.open("rb") as file:
        digest = sidecar.digest(record, _OneAtATime(file.fileno(), header))
    if header.metadata.get("sha256") != digest:
        raise ValueError(f"{path} is damaged: its contents do not match the digest that was written with them")
    return AdapterFile(path, {}, layers, ())


class _OneAtATime(Mapping[str, Tensor]):
    """The tensors of a file, none of which is kept."""

    def __init__(self, descriptor: int, header: Header) -> None:
        self._descriptor, self._layout = descriptor, header

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._descriptor, self._layout.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.tensors)

    def __len__(self) -> int:
        return len(self._layout.tensors)


def _values(path: Path, config: Mapping[str, Any], key: str) -> list[Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{path} has the {key} {pattern!r}; accepted is an object")
    return list(pattern.values())


def _check_pair(path: Path, name: str, A: TensorInfo, B: TensorInfo, rank: int) -> None:
    for factor, entry, at in (("A", A, 0), ("B", B, 1)):
        if len(entry.shape) != 2 or entry.shape[at] != rank:
            accepted = f"({rank}, in)" if factor == "A" else f"(out, {rank})"
            raise ValueError(f"{path}: lora_{factor} of layer {name!r} has shape {entry.shape}; accepted is {accepted}")
        if entry.torch_dtype not in _FLOATS:
            raise ValueError(
                f"{path}: lora_{factor} of layer {name!r} is {entry.dtype}; accepted are F64, F32, F16 and BF16"
            )
