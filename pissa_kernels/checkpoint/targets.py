"""Which tensors of a checkpoint become residuals: those that PEFT would adapt, asked of PEFT on an empty model."""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layers import in_scope, lora_layers
from ..adapter.names import factor_key
from ..checks import check_rank, check_scaling, parse_init
from ..files.folder import Checkpoint
from ..files.header import TensorInfo
from ..ops import WEIGHT_DTYPES
from ..pissa import Factors, principal_factors

# A single name with one of these is a regular expression; a name may well have a dot.
_PATTERN = re.compile(r"[*+?^$()\[\]{}|\\]")


@dataclass(frozen=True)
class AdapterOptions:
    """What PEFT's ``LoraConfig`` is asked for.

    Attributes:
        rank: r.
        alpha: lora_alpha; None for the rank, which makes the scaling 1.
        init: "pissa" or "pissa_niter_N".
        seed: of the sketches.
        target_modules: "all-linear", names, or one regular expression.
        exclude_modules: names, or one regular expression.
        rank_pattern, alpha_pattern: of single layers, as PEFT takes them.
        use_rslora: s = alpha/√r.
        trust_remote_code: run the model's own code, to know its modules.
    """

    rank: int = 16
    alpha: float | None = None
    init: str = "pissa"
    seed: int = 0
    target_modules: tuple[str, ...] = ("all-linear",)
    exclude_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Target:
    """One weight that becomes a residual.

    Attributes:
        name: of its layer in the model.
        shard, entry: where it lies.
        transposed: it is stored (in, out), as transformers' ``Conv1D`` stores it.
        rank, scaling: of its adapter.
    """

    name: str
    shard: str
    entry: TensorInfo
    transposed: bool
    rank: int
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        m, n = self.entry.shape
        return (n, m) if self.transposed else (m, n)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.entry.torch_dtype
        assert dtype is not None  # find_targets refuses others
        return dtype

    def factors(self, weight: Tensor, options: AdapterOptions) -> Factors:
        """A and B of its weight: the same bits, whoever asks, on as many threads.

        Raises:
            ValueError: the weight's values are refused, with the layer's name.
        """
        return principal_factors(
            weight,
            self.rank,
            scaling=self.scaling,
            init=options.init,
            fan_in_fan_out=self.transposed,
            seed=options.seed,
            where=f"the weight of layer {self.name!r}",
        )

    @property
    def keys(self) -> tuple[str, str]:
        """PEFT's keys of A and B in an adapter's file."""
        return factor_key(self.name, "A"), factor_key(self.name, "B")


@dataclass(frozen=True)
class Adapter:
    """What PEFT made of the options.

    Attributes:
        config: the contents of adapter_config.json, lists sorted; without the base model's place.
        targets: the layers, in the model's order.
    """

    config: Mapping[str, Any]
    targets: tuple[Target, ...]


def find_targets(checkpoint: Checkpoint, options: AdapterOptions) -> Adapter:
    """Ask PEFT on a model without memory, and find its layers' weights among the tensors.

    Raises:
        TypeError: a target that is quantised or of another dtype than float32, float16 and bfloat16.
        ValueError: nothing to adapt; a target that is tied, fused from several tensors, or no linear layer; a rank or
            scaling out of range. The message names the layer.
    """
    import peft

    parse_init(options.init)
    _refuse_quantised(checkpoint)
    model = empty_model(checkpoint, options.trust_remote_code)
    where, fused = _tensors_of(model, checkpoint)
    tied = _tied(model)
    config = _lora_config(model, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    tensors, targets = checkpoint.tensors(), []
    layers = list(lora_layers(adapted))
    _check_kinds(layers)
    for name, layer in layers:
        weight = f"{name}.weight"
        _check_untied(name, layer, tied)
        if weight in fused or len(where[weight]) != 1:
            found = fused.get(weight) or where[weight]
            raise ValueError(
                f"layer {name!r}: its weight is no tensor of {checkpoint.folder} of its own"
                + (f", transformers makes it of {', '.join(map(repr, found[:3]))}" if found else "")
                + "; leave it out with --exclude-modules"
            )
        shard, entry = tensors[where[weight][0]]
        target = Target(
            name, shard, entry, bool(layer.fan_in_fan_out), int(layer.r["default"]), float(layer.scaling["default"])
        )
        _check_target(target, tuple(layer.get_base_layer().weight.shape))
        targets.append(target)
    if not targets:
        raise ValueError("PEFT found no layer to adapt")
    return Adapter(_config_record(adapted.peft_config["default"]), tuple(targets))


def empty_model(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The model of a checkpoint's config, on the meta device.

    Raises:
        ValueError: transformers does not know its class.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
    )
    name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    with torch.device("meta"):
        own = [auto for auto, code in (getattr(config, "auto_map", None) or {}).items() if code.endswith(f".{name}")]
        if own and trust_remote_code:
            return getattr(transformers, own[0]).from_config(config, trust_remote_code=True)
        if name == "AutoModel":
            return transformers.AutoModel.from_config(config)
        if not hasattr(transformers, name):
            raise ValueError(
                f"{checkpoint.folder / 'config.json'} names the class {name}, which transformers "
                f"{transformers.__version__} does not have" + ("; --trust-remote-code runs its own" if own else "")
            )
        return getattr(transformers, name)(config)


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / "config.json"
    try:
        record: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no model's config: {error}") from None
    quantisation = record.get("quantization_config")
    if quantisation:
        raise TypeError(
            f"{checkpoint.folder} is quantised ({quantisation.get('quant_method', 'quantization_config')}); PiSSA "
            "takes the float checkpoint that it was made from"
        )


def _lora_config(model: nn.Module, options: AdapterOptions) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        target_modules=module_names(options.target_modules),
        exclude_modules=module_names(options.exclude_modules) if options.exclude_modules else None,
        rank_pattern=dict(options.rank_pattern),
        alpha_pattern=dict(options.alpha_pattern),
        use_rslora=options.use_rslora,
        # the weights will be residuals already when PEFT sees them
        init_lora_weights=True,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        # generate() belongs to PEFT's model of this task; other tasks would add modules to be trained
        task_type="CAUSAL_LM" if causal else None,
    )


def module_names(names: tuple[str, ...]) -> str | list[str]:
    if len(names) == 1 and (names[0] == "all-linear" or _PATTERN.search(names[0])):
        return names[0]
    return list(names)


def _tensors_of(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The tensors that transformers loads into each parameter: those that it takes as they are, those it transforms."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    plain: dict[str, list[str]] = defaultdict(list)
    transformed: dict[str, list[str]] = defaultdict(list)
    for key in checkpoint.tensors():
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        (plain if converter is None else transformed)[name].append(key)
    return plain, transformed


def _tied(model: nn.Module) -> dict[str, str]:
    """For each module whose weight is another's too, the other's name."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {
        name.removesuffix(".weight"): next(other for other in group if other != name)
        for group in groups.values()
        if len(group) > 1
        for name in group
    }


def _check_kinds(layers: Sequence[tuple[str, Any]]) -> None:
    """Refuse everything but linear layers, and say which of the layers are linear.

    PEFT reads all-linear of a mixture of experts as its fused experts and its router, too.
    """
    linear = sorted({name.rpartition(".")[2] for name, layer in layers if _is_linear(layer)})
    for name, layer in layers:
        if not _is_linear(layer):
            base = layer.get_base_layer()
            parameter = getattr(layer, "parameter_name", "weight")
            shape = tuple(getattr(getattr(base, parameter, None), "shape", ()))
            raise ValueError(
                f"layer {name!r} is a {type(base).__name__} whose {parameter} has shape {shape}; PiSSA takes linear "
                "layers with a 2-D weight" + (f", here those of --target-modules {' '.join(linear)}" if linear else "")
            )


def _is_linear(layer: Any) -> bool:
    return in_scope(layer) and not isinstance(layer.get_base_layer(), nn.Embedding)


def _check_untied(name: str, layer: Any, tied: Mapping[str, str]) -> None:
    if name in tied:
        raise ValueError(
            f"the weight of layer {name!r} {tuple(layer.get_base_layer().weight.shape)} is tied to {tied[name]}, which "
            "would be changed with it. Leave it out with --exclude-modules, or save the model untied "
            "(config.tie_word_embeddings = False)."
        )


def _check_target(target: Target, shape: tuple[int, ...]) -> None:
    where = f"the weight of layer {target.name!r}"
    if target.entry.torch_dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"{where} is {target.entry.dtype} with shape {target.entry.shape}; PiSSA takes F32, F16 and BF16. "
            "A quantised checkpoint is made from the residual."
        )
    if target.entry.shape != shape:
        raise ValueError(f"{where} has shape {target.entry.shape}, but the model of config.json takes {shape}")
    check_rank(target.rank, target.shape, where)
    check_scaling(target.scaling, where)


def _config_record(config: Any) -> dict[str, Any]:
    """As PEFT saves a config, its sets sorted: the same bytes in every run."""
    config.inference_mode = True
    record = {
        key: sorted(value) if isinstance(value, (set, list)) else value for key, value in config.to_dict().items()
    }
    return {key: getattr(value, "value", value) for key, value in record.items()}
