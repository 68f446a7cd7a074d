"""Which layers of a checkpoint become quantized: those that transformers quantizes, found on an empty model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..checks import layer_context
from ..files.folder import Checkpoint
from ..files.header import NAMES, TensorInfo
from ..ops import WEIGHT_DTYPES
from ..quantize.bnb import EightBit, FourBit
from ..quantize.iteration import DEFAULT_ITERATIONS, Iterations, check_iterations
from ..quantize.scheme import Scheme
from .classes import tensors_of_parameters
from .config import making_model, read_config
from .model import class_name, empty_model, tied_weights
from .selection import listed
from .weights import LinearWeight

FORMATS = ("nf4", "fp4", "int8")
DEFAULT_BLOCK = 64
# Those that bitsandbytes has kernels for.
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class QuantizationOptions:
    """How the residuals are quantized.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        double: whether the scales of a 4-bit format are quantized too.
        block: elements that share a scale in a 4-bit format.
        iterations: alternations of SVD and quantization, or "auto".
        nuclear: whether the report has nuclear norms of the errors.

    Raises:
        ValueError: an option is out of range, or is none of the format's.
    """

    kind: str
    double: bool = False
    block: int = DEFAULT_BLOCK
    iterations: Iterations = DEFAULT_ITERATIONS
    nuclear: bool = False

    def __post_init__(self) -> None:
        if self.kind not in FORMATS:
            raise ValueError(f"quantize must be one of {', '.join(FORMATS)}, got {self.kind!r}")
        if self.block not in BLOCKS:
            raise ValueError(f"quant_block must be one of {', '.join(map(str, BLOCKS))}, got {self.block!r}")
        check_iterations(self.iterations)
        if self.kind == "int8" and self.double:
            raise ValueError("double_quant is an option of nf4 and fp4; int8 has a scale for each row")
        if self.kind == "int8" and self.block != DEFAULT_BLOCK:
            raise ValueError("quant_block is an option of nf4 and fp4; int8 has a scale for each row")

    @property
    def scheme(self) -> Scheme:
        """The format with its settings."""
        return EightBit() if self.kind == "int8" else FourBit(self.kind, self.block, self.double)


def quantization_options(
    quantize: str | None, double_quant: bool, quant_block: int, quant_iterations: Iterations, nuclear: bool
) -> QuantizationOptions | None:
    """The options of :func:`pissa_kernels.init_checkpoint`; None without quantization.

    Raises:
        ValueError: of :class:`QuantizationOptions`, or options of a quantization without ``quantize``.
    """
    if quantize is not None:
        return QuantizationOptions(quantize, double_quant, quant_block, quant_iterations, nuclear)
    given = {
        "double_quant": double_quant,
        "quant_block": quant_block != DEFAULT_BLOCK,
        "quant_iterations": quant_iterations != DEFAULT_ITERATIONS,
        "nuclear": nuclear,
    }
    if names := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"{names[0]} needs quantize, one of {', '.join(FORMATS)}")
    return None


@dataclass(frozen=True)
class QuantizationPlan:
    """The layers that become quantized, and what config.json says of them.

    Attributes:
        options: the format and the iterations.
        weights: the weights that become quantized, by the key of their tensor.
        entries: what is added to config.json.
        version: version of bitsandbytes.
        notes: sentences for the user.
    """

    options: QuantizationOptions
    weights: Mapping[str, LinearWeight]
    entries: Mapping[str, Any]
    version: str
    notes: tuple[str, ...]

    def tensors(self, weight: LinearWeight) -> dict[str, TensorInfo]:
        """The tensors that a weight becomes, by what follows the layer's name and a dot. They have no place yet."""
        stem = weight.info.name.removesuffix("weight")
        return {
            suffix: TensorInfo(stem + suffix, NAMES[dtype], shape, 0, dtype.itemsize * torch.Size(shape).numel())
            for suffix, (dtype, shape) in self.options.scheme.layout(weight.shape).items()
        }

    def record(self) -> dict[str, Any]:
        """What decides the bytes of the result, in JSON types."""
        return {**asdict(self.options), "config": dict(self.entries), "bitsandbytes": self.version}


def plan_quantization(
    checkpoint: Checkpoint, options: QuantizationOptions, trust_remote_code: bool
) -> QuantizationPlan:
    """Find the layers that transformers quantizes, and write the config with which it loads them.

    A weight that the checkpoint does not hold as a tensor of its own stays as it is, and config.json says so.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: transformers quantizes no layer, or would not find the result's tensors; the format cannot hold a
            weight. The message names the layer.
    """
    version = _version()
    record = read_config(checkpoint)
    model = empty_model(checkpoint, trust_remote_code)
    name = type(model).__name__
    named = class_name(record, checkpoint.folder / "config.json")
    plain, transformed = tensors_of_parameters(model, checkpoint)
    tied, tensors = tied_weights(model), checkpoint.tensors()
    conv1d = {module for module, layer in model.named_modules() if type(layer).__name__ == "Conv1D"}
    dtypes = Counter(info.torch_dtype for _, info in tensors.values() if info.torch_dtype in WEIGHT_DTYPES)
    dtype = _dtype(record) or (dtypes.most_common(1)[0][0] if dtypes else torch.float32)
    weights, kept = {}, []
    quantizer, _ = _quantized(checkpoint, record, model, _config(options, dtype, None))
    for layer in _layers(model):
        keys = plain.get(f"{layer}.weight", [])
        known = len(keys) == 1 and f"{layer}.weight" not in transformed and layer not in tied
        if known and keys[0].endswith(".weight") and tensors[keys[0]][1].torch_dtype in WEIGHT_DTYPES:
            weights[keys[0]] = LinearWeight(layer, *tensors[keys[0]], layer in conv1d)
        else:
            kept.append(layer)
    if not weights:
        raise ValueError(f"{checkpoint.folder}: transformers quantizes no layer of a {name}; leave --quantize out")
    # loading has to decide the same: by the rule of the class where that suffices, by names elsewhere
    skipped = sorted({*quantizer.modules_to_not_convert, *kept}) if kept or name != named else None
    config = _config(options, dtype, skipped)
    entries = {"quantization_config": config.to_dict()}
    if _dtype(record) is None:  # transformers would take that of the first tensor, which may be a scale
        entries["dtype"] = str(dtype).removeprefix("torch.")
    entries["quantization_config"]["quant_method"] = str(config.quant_method.value)
    notes = [f"stay as they are, as they are not tensors that can be quantized: {listed(kept)}"] if kept else []
    plan = QuantizationPlan(options, weights, entries, version, tuple(notes))
    _check_loading(checkpoint, record, empty_model(checkpoint, trust_remote_code), plan, config)
    return plan


def _version() -> str:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--quantize needs bitsandbytes ({error}): pip install 'pissa-kernels[quantize]'", name="bitsandbytes"
        ) from None
    return str(bitsandbytes.__version__)


def _dtype(record: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config names; None if it names none of the three."""
    name = record.get("dtype", record.get("torch_dtype"))
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if dtype in WEIGHT_DTYPES else None


def _config(options: QuantizationOptions, dtype: torch.dtype, skipped: list[str] | None) -> Any:
    import transformers

    if options.kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=options.kind,
        bnb_4bit_use_double_quant=options.double,
        llm_int8_skip_modules=skipped,
    )


def _quantized(checkpoint: Checkpoint, record: dict[str, Any], model: Any, config: Any) -> tuple[Any, list[Any]]:
    """Let transformers replace the layers of an empty model. Returns its quantizer, and how it loads tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    with making_model(checkpoint, record):
        quantizer.preprocess_model(model=model, device_map=None)
        return quantizer, get_model_conversion_mapping(model, hf_quantizer=quantizer)


def _layers(model: Any) -> list[str]:
    """Names of the layers that bitsandbytes computes."""
    return [name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")]


def _check_loading(
    checkpoint: Checkpoint, record: dict[str, Any], model: Any, plan: QuantizationPlan, config: Any
) -> None:
    """Check that transformers loads every tensor of the result into the layer that it belongs to."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    before = {name for name, _ in model.named_modules()}
    _, transforms = _quantized(checkpoint, record, model, config)
    expected = {weight.name for weight in plan.weights.values()}
    unlike = sorted({*_layers(model)} ^ expected) or sorted({name for name, _ in model.named_modules()} ^ before)
    if unlike:
        raise ValueError(
            f"{checkpoint.folder}: transformers loads a quantized {type(model).__name__} with other modules "
            f"({listed(unlike)}) than the checkpoint has; leave --quantize out"
        )
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    for weight in plan.weights.values():
        with layer_context(weight.label):
            for info in plan.tensors(weight).values():
                name, _ = rename_source_key(info.name, renamings, converters, model.base_model_prefix, parameters)
                if name != f"{weight.name}.weight":
                    raise ValueError(f"transformers would load its tensor {info.name!r} as {name!r}")
