"""Which tensors of a checkpoint become residuals: the weights that PEFT adapts, found with PEFT on an empty model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapter.layers import placed_lora_layers
from ..adapter.patterns import has_name, pattern_key, with_ranks, without_order
from ..checks import check_rank, check_scaling, layer_context
from ..factors import Recipe
from ..files.folder import Checkpoint
from ..ops import WEIGHT_DTYPES
from .classes import Loading, loading_of
from .experts import find_stack, is_wrapper, matrices_of, stacks_in
from .model import empty_model, tied_weights
from .options import ALL_LINEAR, AdapterOptions, as_peft, is_all_linear
from .selection import check_names, check_parameters, check_patterns, listed, read_past
from .weights import Stack, Target


@dataclass(frozen=True)
class Adapter:
    """What PEFT makes of the options.

    Attributes:
        config: contents of adapter_config.json with sorted lists, without the path of the base model.
        targets: the layers, in the model's order: linear ones, and stacks of matrices.
        left_out: layers that all-linear leaves out, with the reason.
        notes: sentences for the user about single layers.
    """

    config: Mapping[str, Any]
    targets: tuple[Target | Stack, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]


def find_targets(checkpoint: Checkpoint, options: AdapterOptions) -> Adapter:
    """Inject the adapter into a model on the meta device, and find the weights of its layers among the tensors.

    Raises:
        TypeError: a target is quantized, or its dtype is not float32, float16 or bfloat16.
        ValueError: nothing to adapt; a tensor of another shape than the model's; a target that is tied, read by another
            module, made of other tensors in a way that cannot be undone, or neither a linear layer nor a stack of
            matrices; a rank or scaling out of range; a name or pattern that decides for no layer. The message names the
            layer, the tensor or the option.
    """
    model = empty_model(checkpoint, options.trust_remote_code)
    check_names(model, options)
    stacks = stacks_in(model)
    check_parameters(model, options, stacks)
    modules = [name for name, _ in model.named_modules()]
    loading = loading_of(model, checkpoint)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = tied_weights(model)
    adapted = _adapt(model, checkpoint, options, stacks)
    layers = list(placed_lora_layers(adapted))
    _check_kinds(layers, options, stacks)
    _check_parameters_of_peft(adapted.peft_config["default"], options)
    linear = [name for name, _, layer in layers if not is_wrapper(layer)]
    left_out, notes = read_past(adapted.get_base_model(), linear, options)
    kind, named = type(model).__name__, (getattr(model.config, "architectures", None) or ["no class"])[0]
    if kind != named:
        notes.append(f"config.json names {named}; the tensors are those of {kind}, which is taken")
    targets, limited = [], []
    for name, module, layer in layers:
        if name in left_out:
            continue
        shape = matrices_of(name, layer)[1:] if is_wrapper(layer) else tuple(layer.get_base_layer().weight.shape)
        _check_untied(name, shape, tied, is_wrapper(layer))
        rank, width = int(layer.r["default"]), min(shape)
        if width < rank and pattern_key(options.rank_pattern, name) is None:
            limited.append(f"{name} (rank {width} instead of {rank})")
            rank = width
        recipe = Recipe(rank, float(layer.scaling["default"]), options.init, options.seed)
        target = _target(name, module, layer, recipe, loading)
        with layer_context(target.label):
            _check_target(target, shape)
        targets.append(target)
    _check_shapes(shapes, checkpoint, loading.plain)
    if not targets:
        raise ValueError(
            "PEFT found no layer to adapt" + "".join(f"; {name!r}: {why}" for name, why in left_out.items())
        )
    if len(limited) == len(targets):
        widest = max(targets, key=lambda target: min(target.shape))
        with layer_context(widest.label):
            check_rank(options.rank, widest.shape)
    # PEFT nests the wrappers of one module, the last outermost
    order = {name: index for index, name in enumerate(shapes)}
    targets.sort(key=lambda target: order[target.name if isinstance(target, Stack) else f"{target.name}.weight"])
    names = [target.name for target in targets]
    check_patterns(options, names, [*modules, *stacks])
    config = _config_record(adapted.peft_config["default"], options, names, list(left_out))
    others = [name for name in stacks if name not in names]
    if others and any(map(is_all_linear, options.target_modules)):
        how = f"--target-parameters {' '.join(_endings(others))} adapts them"
        notes.append(f"not among all-linear, and stay as they are: {listed(others)}; {how}")
    if limited:  # as the hook does it; the scalings stay
        config = with_ranks(config, {target.name: target.recipe.rank for target in targets})
        notes.append(f"narrower than the rank, and get all the rank that they have: {listed(limited)}")
    return Adapter(config, tuple(targets), left_out, tuple(notes))


def _adapt(model: nn.Module, checkpoint: Checkpoint, options: AdapterOptions, stacks: Sequence[str]) -> Any:
    """The model with the adapter. PEFT knows all-linear alone, so beside names it becomes names first."""
    target_modules = as_peft(options.target_modules)
    if isinstance(target_modules, list) and any(map(is_all_linear, target_modules)):
        linear = _inject(empty_model(checkpoint, options.trust_remote_code), options, ALL_LINEAR)
        _check_kinds(list(placed_lora_layers(linear)), options, stacks)
        target_modules = sorted({*linear.peft_config["default"].target_modules, *options.named})
    return _inject(model, options, target_modules)


def _target(name: str, module: str, layer: Any, recipe: Recipe, loading: Loading) -> Target | Stack:
    """The target of a layer that PEFT calls ``module``, with the places of its tensors."""
    if is_wrapper(layer):
        plain, conversion = loading.plain.get(name, ()), loading.conversions.get(name)
        return find_stack(name, module, layer, recipe, loading.tensors, plain, conversion)
    shard, info = loading.tensors[_only_tensor(name, loading)]
    return Target(name, shard, info, bool(layer.fan_in_fan_out), recipe)


def _only_tensor(name: str, loading: Loading) -> str:
    """Key of the tensor that is the weight of a layer.

    Raises:
        ValueError: transformers makes the weight of other tensors, or of none.
    """
    weight = f"{name}.weight"
    found = loading.transformed.get(weight) or loading.plain.get(weight, [])
    if weight in loading.transformed or len(found) != 1:
        raise ValueError(
            f"layer {name!r}: its weight is not a tensor of its own in {loading.folder}"
            + (f", transformers makes it of {', '.join(map(repr, found[:3]))}" if found else "")
            + "; leave the layer out with --exclude-modules"
        )
    return found[0]


def _inject(model: nn.Module, options: AdapterOptions, target_modules: str | list[str]) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, _lora_config(model, options, target_modules), low_cpu_mem_usage=True)


def _lora_config(model: nn.Module, options: AdapterOptions, target_modules: str | list[str]) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        target_modules=target_modules,
        exclude_modules=as_peft(options.exclude_modules) if options.exclude_modules else None,
        target_parameters=list(options.target_parameters) or None,
        rank_pattern=dict(options.rank_pattern),
        alpha_pattern=dict(options.alpha_pattern),
        use_rslora=options.use_rslora,
        # the adapter is loaded onto residuals, which nothing must be subtracted from again
        init_lora_weights=True,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        # PEFT's model of this task has generate(); those of other tasks would add modules to train
        task_type="CAUSAL_LM" if causal else None,
    )


def _check_kinds(layers: Sequence[tuple[str, str, Any]], options: AdapterOptions, stacks: Sequence[str]) -> None:
    """Refuse layers that are neither linear nor named in ``target_parameters``, and say what names adapt the model.

    For a mixture of experts, PEFT's all-linear includes fused experts and the router; and the names of the projections
    that the experts once had stand for the fused ones.
    """
    linear = sorted({name.rpartition(".")[2] for name, _, layer in layers if _is_linear(layer)})
    modules = f"--target-modules {' '.join(linear)}" if linear else ""
    parameters = f"--target-parameters {' '.join(_endings(stacks))}" if stacks else ""
    for name, module, layer in layers:
        if is_wrapper(layer):
            if any(has_name(entry, name) for entry in options.target_parameters):
                continue
        elif _is_linear(layer):
            continue
        base = layer.get_base_layer()
        parameter = getattr(layer, "parameter_name", "weight")
        shape = tuple(getattr(getattr(base, parameter, None), "shape", ()))
        advice = ", here " * bool(modules) + modules + ", and stacks of matrices with " * bool(parameters) + parameters
        raise ValueError(
            f"layer {module!r} is a {type(base).__name__} whose {parameter} has shape {shape}; PiSSA takes linear "
            f"layers with a 2-D weight{advice}"
        )


def _check_parameters_of_peft(config: Any, options: AdapterOptions) -> None:
    """Refuse a config in which PEFT has put parameters, with ranks of their own, in the place of modules."""
    if converted := {*(config.target_parameters or ())} - {*options.target_parameters}:
        raise ValueError(
            f"target_modules: PEFT adapts the parameters {', '.join(sorted(converted))} in place of the modules that "
            "have their names; name them with --target-parameters alone"
        )


def _is_linear(layer: Any) -> bool:
    from peft.tuners.lora.layer import Linear

    return isinstance(layer, Linear) and not isinstance(layer.get_base_layer(), nn.Embedding)


def _endings(stacks: Sequence[str]) -> list[str]:
    """The last two parts of names of parameters, as ``target_parameters`` takes them."""
    return sorted({".".join(name.split(".")[-2:]) for name in stacks})


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, plain: Mapping[str, Sequence[str]]
) -> None:
    """Refuse tensors that transformers would not load into the model, whether they are targets or not."""
    tensors = checkpoint.tensors()
    for name, keys in plain.items():
        for key in keys if name in shapes else ():
            found, expected = tensors[key][1].shape, shapes[name]
            if found != expected:
                raise ValueError(
                    f"{checkpoint.folder}: tensor {key!r} has shape {found}, and the model of config.json has one of "
                    f"shape {expected}; give the config that belongs to the weights"
                )


def _check_untied(name: str, shape: tuple[int, ...], tied: Mapping[str, str], of_parameter: bool) -> None:
    if name in tied:
        out = "out of target_parameters" if of_parameter else "out with --exclude-modules"
        raise ValueError(
            f"layer {name!r}: the weight {shape} is tied to {tied[name]}, which would change with it. Leave the layer "
            f"{out}, or save the model untied (config.tie_word_embeddings = False)."
        )


def _check_target(target: Target | Stack, shape: tuple[int, ...]) -> None:
    """Check what was found for a layer, whose weight has this shape in the model."""
    if isinstance(target, Target):
        if target.info.torch_dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"the weight is {target.info.dtype}; PiSSA takes F32, F16 and BF16. Quantize the residual checkpoint, "
                "not the original one."
            )
        if target.info.shape != shape:
            raise ValueError(f"the model of config.json has a weight of shape {shape}")
    check_rank(target.recipe.rank, target.shape)
    check_scaling(target.recipe.scaling)


def _config_record(
    config: Any, options: AdapterOptions, names: Sequence[str], left_out: Sequence[str]
) -> dict[str, Any]:
    """The config as PEFT saves it, with sorted sets, so that every run writes the same bytes.

    Args:
        config: PEFT's config after the injection.
        options: the options.
        names: names of the layers that the adapter has.
        left_out: names of layers that PEFT adapted and the adapter does not have.
    """
    config.inference_mode = True
    record = {
        key: sorted(value) if isinstance(value, (set, list)) else value for key, value in config.to_dict().items()
    }
    record["rank_pattern"] = without_order(options.rank_pattern, names, options.rank)
    record["alpha_pattern"] = without_order(options.alpha_pattern, names, config.lora_alpha)
    if left_out:
        excluded = as_peft(options.exclude_modules)
        if isinstance(excluded, str):
            record["exclude_modules"] = "|".join([excluded, *map(re.escape, left_out)])
        else:
            record["exclude_modules"] = sorted({*excluded, *left_out})
    return {key: getattr(value, "value", value) for key, value in record.items()}
