"""``pissa_init``: check a layer, decompose its weight, write the result back. All or nothing for each layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ... import ops
from ...adapter.layouts import Layout, layout_of
from ...checks import check_rank, check_scaling, check_weight, layer_context
from ...factors import Recipe
from ...runtime.shards import is_sharded
from ..notices import Notices
from ..weights.forward import await_record
from ..weights.offload import is_offloaded
from ..weights.quantized import is_quantized
from ..weights.record import InitRecord, records
from ..weights.ties import Ties
from .forms import check_form
from .joint import GatheredJob, is_gathered
from .layer import LayerJob
from .originals import Dequantized
from .quantized_layer import Quantizing, quantized_job
from .sharded_layer import sharded_job

NO_ORIGINALS = Quantizing()


def pissa_init(self: Any, adapter_name: str, init_lora_weights: str) -> None:
    """Start a LoRA adapter from the principal singular triplets of the weight that it adapts.

    Has the signature and the contract of PEFT's ``LoraLayer.pissa_init``. Afterwards ``lora_A`` holds √(S/s)·Vᵀ (r, in)
    and ``lora_B`` U·√(S/s) (out, r), in float32 on the weight's device, rounded to the weight's dtype because PEFT
    stores them in it. The weight holds W − s·B·A in its own storage, layout and dtype. If the weight or the adapter is
    on the meta device, a checkpoint will fill it: nothing is changed, and a warning says so.

    Other layers than linear ones have A and B in the shapes that PEFT gives them, for each matrix of their weight: the
    weight of an embedding is transposed, that of a convolution is (out, in·k) for each of its groups, and a stack of
    experts is one matrix for each expert. Of an ``nn.MultiheadAttention`` this is ``in_proj``; ``out_proj`` has a LoRA
    layer of its own, ``self.base_layer.out_proj``.

    If the weight is a ``DTensor``, all processes of its mesh call this. FSDP2 keeps parameters gathered after a pass,
    and drops what is written to them: give them back first (``FSDPModule.reshard``), which the hook does by itself.

    Args:
        self: a LoRA layer of PEFT: Linear, Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention or ParamWrapper.
        adapter_name: key of the adapter in those.
        init_lora_weights: "pissa" or "pissa_niter_N", as for :func:`pissa_kernels.decompose`.

    Raises:
        TypeError: a quantized weight, or a dtype other than float32, float16 and bfloat16.
        ValueError: an unknown ``init_lora_weights``; a rank, scaling or shape out of range; NaN, Inf or an empty
            weight; a weight that is offloaded, or used in a second place; a module whose adapter PEFT computes
            in another way than the module computes (a dilated convolution, an embedding with ``max_norm``). Nothing has
            been written then.

    Examples:
        >>> import peft, torch
        >>> import pissa_kernels as pk
        >>> model = torch.nn.Sequential(torch.nn.Linear(48, 64, bias=False))
        >>> W = model[0].weight.detach().clone()
        >>> config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights=True)
        >>> layer = peft.inject_adapter_in_model(config, model)[0]
        >>> pk.pissa_init(layer, "default", "pissa")
        >>> A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        >>> bool(torch.allclose(layer.weight + layer.scaling["default"] * B @ A, W, atol=1e-6))
        True
    """
    job = prepare(self, adapter_name, init_lora_weights)
    if job is not None:
        job.run()


def prepare(
    layer: Any,
    adapter_name: str,
    init: str,
    *,
    seed: int = 0,
    name: str | None = None,
    ties: Ties | None = None,
    given: InitRecord | None = None,
    notices: Notices | None = None,
    model: nn.Module | None = None,
    quantizing: Quantizing = NO_ORIGINALS,
    deferred: bool = False,
) -> LayerJob | None:
    """Run all checks that need no arithmetic. The arguments of a caller are checked here, and nowhere below.

    Args:
        layer, adapter_name, init: as for :func:`pissa_init`.
        seed: seed of the sketch.
        name: name of the layer in its model, for messages and the report.
        ties: parameters of the model that share memory. With it, a weight that the model uses twice is refused.
        given: initial factors that a trained adapter was saved with.
        notices: collects what the caller warns of; without it, the warning is given here.
        model: the model that PEFT adapts, for the names of its tensors in a checkpoint.
        quantizing: the originals of quantized weights.
        deferred: whether PEFT has cast A and B to their final dtype already.

    Returns:
        The job; None where the layer is left as it is.

    Raises:
        TypeError, ValueError: as for :func:`pissa_init`.
    """
    if given is not None:
        init, seed = given.report.init, given.report.seed
    layout = layout_of(layer)
    recipe = Recipe(layout.rank(adapter_name), float(layout.scalings[adapter_name]), init, seed)
    job = LayerJob(layer, adapter_name, recipe, name, given, deferred)
    base, weight = layout.module, layout.weight
    with layer_context(job.label):
        _check_not_offloaded(base, weight)
        if weight.is_meta or (layout.factors(adapter_name)[0].is_meta and given is None):
            told = Notices() if notices is None else notices
            told.left_alone.append(job.label)
            if not records(layer):
                await_record(layer, adapter_name, job.label)
            if notices is None:
                told.warn()
            return None
        if is_quantized(base) and type(layout) is Layout:
            job = quantized_job(job, model, quantizing)
            if isinstance(quantizing.originals, Dequantized) and notices is not None:
                notices.dequantized.append(job.label)
        else:
            check_weight(weight, matrix=layout.is_matrix)
        if is_sharded(weight):
            job = sharded_job(job)
        elif is_gathered(layout.weight) and type(job) is LayerJob:
            job = GatheredJob(**{name: getattr(job, name) for name in LayerJob.__dataclass_fields__})
        if is_parametrized(base, layout.parameter) or layout.parameter not in base._parameters:
            raise ValueError(
                "the weight is computed from other parameters (a parametrization, weight_norm, FSDP's flat parameter) "
                "and cannot hold a residual"
            )
        local = weight.to_local() if is_sharded(weight) else weight
        if weight.is_floating_point() and ops.has_overlap(local):
            raise ValueError(f"elements of the weight share memory (strides {weight.stride()}); clone it first")
        _check_unshared(layout, ties)
        check_form(layout)
        check_rank(recipe.rank, job.shape)
        check_scaling(recipe.scaling)
        job.check_adapter()
        job.check_original()
    return job


def _check_not_offloaded(base: nn.Module, weight: Tensor) -> None:
    """Refuse a weight whose values accelerate keeps where they cannot be changed."""
    if weight.is_meta and is_offloaded(base):
        raise ValueError(
            "the weight is offloaded to disk, where PiSSA writes nothing. Load the model without disk offload "
            "(device_map with 'cpu', or one device), or offload a residual model that is saved already "
            "(save_pissa, pissa-kernels init)"
        )


def _check_unshared(layout: Layout, ties: Ties | None) -> None:
    """Refuse a weight that the model uses a second time, where the residual would be missing its adapter."""
    # replicated layers are compared when all of them are known
    other = ties.of(layout.module, layout.parameter) if ties is not None and not ties.replicated else None
    if other is not None:
        raise ValueError(
            f"the weight {tuple(layout.weight.shape)} is tied to {other}, which would change with it. Untie them first "
            "(config.tie_word_embeddings = False, then module.weight = nn.Parameter(module.weight.detach().clone())), "
            "adapt the embedding with ensure_weight_tying=True, or leave the layer out of target_modules."
        )
