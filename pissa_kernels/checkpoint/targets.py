"""Which tensors of a checkpoint become residuals: the weights that PEFT adapts, found with PEFT on an empty model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..adapter.layers import in_scope, lora_layers
from ..adapter.names import factor_key
from ..checks import check_rank, check_scaling, layer_context, parse_init
from ..files.folder import Checkpoint
from ..files.header import TensorInfo
from ..ops import WEIGHT_DTYPES
from ..pissa import Recipe
from .model import empty_model, tensors_of_parameters, tied_weights

# A single name with one of these characters is a regular expression. A dot does not count: module names have dots.
_PATTERN = re.compile(r"[*+?^$()\[\]{}|\\]")


@dataclass(frozen=True)
class AdapterOptions:
    """Options of the adapter, as for PEFT's ``LoraConfig``.

    Attributes:
        rank: r.
        alpha: ``lora_alpha``; None for the rank, a scaling of 1.
        init: "pissa" or "pissa_niter_N".
        seed: seed of the sketches.
        target_modules: "all-linear", names, or one regular expression.
        exclude_modules: names, or one regular expression.
        rank_pattern, alpha_pattern: ranks and alphas of single layers, as PEFT takes them.
        use_rslora: scale by alpha/√r instead of alpha/r.
        trust_remote_code: run the Python code that comes with the checkpoint to build its model.
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
        name: name of its layer in the model.
        shard, info: file and place of the tensor.
        transposed: whether it is stored (in, out), as in transformers' ``Conv1D``.
        recipe: rank, scaling, initializer and seed.
    """

    name: str
    shard: str
    info: TensorInfo
    transposed: bool
    recipe: Recipe

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        m, n = self.info.shape
        return (n, m) if self.transposed else (m, n)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.info.torch_dtype
        assert dtype is not None  # find_targets refuses others
        return dtype

    @property
    def label(self) -> str:
        """The layer in messages."""
        return f"layer {self.name!r}, weight {self.info.shape}"

    @property
    def keys(self) -> tuple[str, str]:
        """Keys of A and B in the adapter's file."""
        return factor_key(self.name, "A"), factor_key(self.name, "B")


@dataclass(frozen=True)
class Adapter:
    """What PEFT makes of the options.

    Attributes:
        config: contents of adapter_config.json with sorted lists, without the path of the base model.
        targets: the layers, in the model's order.
    """

    config: Mapping[str, Any]
    targets: tuple[Target, ...]


def find_targets(checkpoint: Checkpoint, options: AdapterOptions) -> Adapter:
    """Inject the adapter into a model on the meta device, and find the weights of its layers among the tensors.

    Raises:
        TypeError: a target is quantized, or its dtype is not float32, float16 or bfloat16.
        ValueError: nothing to adapt; a target that is tied, fused from several tensors, or not a linear layer; a rank
            or scaling out of range. The message names the layer.
    """
    import peft

    parse_init(options.init)  # before the model is built
    model = empty_model(checkpoint, options.trust_remote_code)
    plain, transformed = tensors_of_parameters(model, checkpoint)
    tied = tied_weights(model)
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
        if weight in transformed or len(plain[weight]) != 1:
            found = transformed.get(weight) or plain[weight]
            raise ValueError(
                f"layer {name!r}: its weight is not a tensor of its own in {checkpoint.folder}"
                + (f", transformers makes it of {', '.join(map(repr, found[:3]))}" if found else "")
                + "; leave the layer out with --exclude-modules"
            )
        shard, info = tensors[plain[weight][0]]
        recipe = Recipe(int(layer.r["default"]), float(layer.scaling["default"]), options.init, options.seed)
        target = Target(name, shard, info, bool(layer.fan_in_fan_out), recipe)
        with layer_context(target.label):
            _check_target(target, tuple(layer.get_base_layer().weight.shape))
        targets.append(target)
    if not targets:
        raise ValueError("PEFT found no layer to adapt")
    return Adapter(_config_record(adapted.peft_config["default"]), tuple(targets))


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
        # the adapter is loaded onto residuals, which nothing must be subtracted from again
        init_lora_weights=True,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        # PEFT's model of this task has generate(); those of other tasks would add modules to train
        task_type="CAUSAL_LM" if causal else None,
    )


def module_names(names: tuple[str, ...]) -> str | list[str]:
    """Names as PEFT's config takes them: a list, or a single "all-linear" or regular expression as a string."""
    if len(names) == 1 and (names[0] == "all-linear" or _PATTERN.search(names[0])):
        return names[0]
    return list(names)


def _check_kinds(layers: Sequence[tuple[str, Any]]) -> None:
    """Refuse layers that are not linear, and name those that are.

    For a mixture of experts, PEFT's all-linear includes fused experts and the router.
    """
    linear = sorted({name.rpartition(".")[2] for name, layer in layers if _is_linear(layer)})
    for name, layer in layers:
        if not _is_linear(layer):
            base = layer.get_base_layer()
            parameter = getattr(layer, "parameter_name", "weight")
            shape = tuple(getattr(getattr(base, parameter, None), "shape", ()))
            raise ValueError(
                f"layer {name!r} is a {type(base).__name__} whose {parameter} has shape {shape}; PiSSA takes linear "
                "layers with a 2-D weight" + (f", here --target-modules {' '.join(linear)}" if linear else "")
            )


def _is_linear(layer: Any) -> bool:
    return in_scope(layer) and not isinstance(layer.get_base_layer(), nn.Embedding)


def _check_untied(name: str, layer: Any, tied: Mapping[str, str]) -> None:
    if name in tied:
        raise ValueError(
            f"layer {name!r}: the weight {tuple(layer.get_base_layer().weight.shape)} is tied to {tied[name]}, which "
            "would change with it. Leave the layer out with --exclude-modules, or save the model untied "
            "(config.tie_word_embeddings = False)."
        )


def _check_target(target: Target, shape: tuple[int, ...]) -> None:
    if target.info.torch_dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"the weight is {target.info.dtype}; PiSSA takes F32, F16 and BF16. Quantize the residual checkpoint, not "
            "the original one."
        )
    if target.info.shape != shape:
        raise ValueError(f"the model of config.json has a weight of shape {shape}")
    check_rank(target.recipe.rank, target.shape)
    check_scaling(target.recipe.scaling)


def _config_record(config: Any) -> dict[str, Any]:
    """The config as PEFT saves it, with sorted sets, so that every run writes the same bytes."""
    config.inference_mode = True
    record = {
        key: sorted(value) if isinstance(value, (set, list)) else value for key, value in config.to_dict().items()
    }
    return {key: getattr(value, "value", value) for key, value in record.items()}
