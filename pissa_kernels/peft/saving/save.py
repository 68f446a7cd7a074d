"""Saving the residual model with its initial adapter, and the sidecar of a trained adapter."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...adapter.layers import lora_layers
from ...adapter.names import ADAPTER_FOLDER, KEY_PREFIX, WEIGHTS_NAME, own_name
from ...checks import asks_for_pissa
from ...files.atomic import atomic_folder
from ...report import REPORT_NAME
from ...runtime.gathering import agreeing, gather_to_first, owners_of
from ...runtime.shards import reshard
from ..weights.known import check_known
from ..weights.offload import resident
from ..weights.quantized import in_standard_order
from ..weights.record import InitRecord, of_adapter
from ..weights.wrappers import alive, base_of, innermost, repeated_names, unwrapped
from . import sidecar
from .conversion import check_convertible, complete_conversion, embeddings_to_save
from .pieces import check_factors, check_residuals, check_saved
from .start import initial_state, residual_state


def save_pissa(
    peft_model: Any, out: str | os.PathLike[str], *, adapter_name: str = "default", tokenizer: Any = None
) -> None:
    """Save the residual model, and its initial adapter in ``pissa_init/``, for plain transformers and PEFT to load.

    The layout is that of PEFT's recipe, without a second SVD. The adapter's config has ``init_lora_weights=True``, so
    that loading it onto the residual model subtracts nothing. Whether or not the model has been trained since, the
    adapter is the initial one: A and B, and all else that PEFT trains, such as magnitudes, biases, copied modules and
    tokens. ``save_pretrained(…, path_initial_model_for_weight_conversion=…)`` accepts ``pissa_init/``. ``out`` appears
    complete or not at all, and the model is not changed.

    A model that several processes hold together is saved by all of them: each calls this function with the same
    arguments, the first one writes, all return when it has written, and an error is raised in all. Under tensor
    parallelism and FSDP2 the tensors are gathered one at a time: each process needs memory for the largest one on its
    device, and the first one host memory for the whole model and its adapter. Under DeepSpeed ZeRO-3 and FSDP1 the call
    is within ``deepspeed.zero.GatheredParameters(list(model.parameters()))`` or
    ``FullyShardedDataParallel.summon_full_params(model)``, in all processes. A replica, as under DDP, saves alone.

    Args:
        peft_model: a model with an adapter that was initialized under :func:`pissa_kernels.patch_peft`; also a model of
            transformers with an adapter of its own (``model.add_adapter``).
        out: a folder that does not exist or is empty.
        adapter_name: name of the adapter.
        tokenizer: saved into ``out`` too; None for none.

    Raises:
        FileExistsError: ``out`` is not an empty folder.
        ValueError: there is no such adapter, it was not initialized by this package, an adapter is merged into the
            weights, an initial value is not known any more, the base model's tensors are not those that it had before
            PEFT changed it, or parameters are in pieces that have to be gathered first. Nothing has been written then.
        RuntimeError: another process has failed otherwise.

    Examples:
        >>> import os, peft, tempfile, torch
        >>> import pissa_kernels as pk
        >>> model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
        >>> with pk.patch_peft():
        ...     model = peft.get_peft_model(model, config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pk.save_pissa(model, os.path.join(folder, "residual"))
        ...     sorted(os.listdir(os.path.join(folder, "residual")))
        ['model.safetensors', 'pissa_init']
    """
    out = Path(out)
    peft_model = innermost(peft_model)
    with unwrapped(peft_model):
        check_saved(peft_model, dict(peft_model.named_parameters()))
        reshard(peft_model)
        owners = owners_of(peft_model)
        with agreeing(owners):
            if owners.first and out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise FileExistsError(f"{out} exists and is not an empty folder")
        with agreeing(owners):
            records, adapter, base = _to_save(peft_model, adapter_name)
        adapter = gather_to_first(adapter, owners)
        base = gather_to_first(base, owners, repeated_names(base_of(peft_model)))
        with agreeing(owners):
            if owners.first:
                check_residuals(peft_model, adapter_name, base)
                with atomic_folder(out) as folder:
                    _save_adapter(peft_model, adapter_name, adapter, out, folder / ADAPTER_FOLDER)
                    sidecar.report_of(records).write(folder / ADAPTER_FOLDER / REPORT_NAME)
                    _save_base(base_of(peft_model), base, folder)
                    if tokenizer is not None:
                        tokenizer.save_pretrained(folder)


def _to_save(
    peft_model: Any, adapter_name: str
) -> tuple[dict[str, InitRecord], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The records, the initial adapter, and the tensors of the residual model. Nothing is gathered yet."""
    records = records_of(peft_model, adapter_name)
    if not records:
        raise ValueError(
            f"the adapter {adapter_name!r} was not initialized by pissa_kernels (adapters: "
            f"{', '.join(getattr(peft_model, 'peft_config', ())) or 'none'}); make or load the model under patch_peft()"
        )
    for name, layer in lora_layers(peft_model):
        if layer.merged:
            raise ValueError(f"an adapter is merged into the weight of layer {name!r}; unmerge it first")
        check_known(layer)
    _check_saves_tensors(base_of(peft_model))
    in_standard_order(peft_model)
    with resident(peft_model):
        return records, initial_state(peft_model, adapter_name), residual_state(peft_model, adapter_name)


def records_of(peft_model: Any, adapter_name: str) -> dict[str, InitRecord]:
    """The record of each layer for one adapter, by the layer's name in the base model."""
    found = {name: of_adapter(layer, adapter_name) for name, layer in lora_layers(peft_model)}
    return {name: record for name, record in found.items() if record is not None}


def embeddings_of(peft_model: Any) -> set[str]:
    """Names of the adapted embeddings of a model."""
    from peft.tuners.lora.layer import Embedding

    return {name for name, layer in lora_layers(peft_model) if isinstance(layer, Embedding)}


class SavePretrained:
    """``save_pretrained`` of a ``PeftModel`` that was made under the hook: adds the sidecar of each PiSSA adapter.

    PEFT 0.21 saves nothing of modules that FSDP1, activation checkpointing or ``torch.compile`` has wrapped, because it
    looks for their names in a state dict that has others. So it sees the model without the wrappers.

    It is an attribute of the model, because the patch has usually ended when the model is saved. It is copied and
    pickled with the model, and does not keep the model alive. An adapter that is converted to plain LoRA needs no
    sidecar (:mod:`pissa_kernels.peft.saving.sidecar`); it gets the trained weights that PEFT's conversion omits.
    """

    def __init__(self, peft_model: Any) -> None:
        self._model = weakref.ref(peft_model)

    def __getstate__(self) -> Any:
        return self._model()

    def __setstate__(self, peft_model: Any) -> None:
        self._model = weakref.ref(peft_model)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        peft_model = alive(self._model)
        in_standard_order(peft_model)
        call = inspect.signature(type(peft_model).save_pretrained).bind(peft_model, *args, **kwargs)
        call.apply_defaults()
        options = call.arguments.get("kwargs", {})
        if options.get("state_dict") is not None:
            options["state_dict"] = {own_name(key): value for key, value in options["state_dict"].items()}
        with unwrapped(peft_model):
            _save(peft_model, call)


def _save(peft_model: Any, call: inspect.BoundArguments) -> None:
    """``PeftModel.save_pretrained`` with these arguments, the sidecars, and what PEFT's conversion omits."""
    save, arguments = type(peft_model).save_pretrained, call.arguments
    given = arguments["selected_adapters"]
    selected = list(peft_model.peft_config) if given is None else list(given)
    initial = arguments["path_initial_model_for_weight_conversion"]
    if not selected or not set(selected) <= set(peft_model.peft_config):
        save(*call.args, **call.kwargs)  # PEFT refuses an unknown name
    if arguments["is_main_process"]:
        state = arguments.get("kwargs", {}).get("state_dict")
        for adapter in selected:
            if records_of(peft_model, adapter):
                check_factors(peft_model, adapter, peft_model.state_dict() if state is None else state)
    embeddings = {}
    for adapter in selected:
        if initial is not None:
            check_convertible(peft_model, adapter)
        embeddings[adapter] = arguments["save_embedding_layers"]
        if initial is not None or records_of(peft_model, adapter):
            embeddings[adapter] = embeddings_to_save(peft_model, adapter, embeddings[adapter])
    for choice in dict.fromkeys(embeddings.values()):
        arguments["save_embedding_layers"] = choice
        arguments["selected_adapters"] = [adapter for adapter in selected if embeddings[adapter] == choice]
        save(*call.args, **call.kwargs)
    if not arguments["is_main_process"]:
        return
    for adapter in selected:
        folder = Path(arguments["save_directory"]) / ("" if adapter == "default" else adapter)
        if initial is not None:
            arguments["save_embedding_layers"] = embeddings[adapter]
            complete_conversion(peft_model, adapter, folder, arguments)
            _warn_of_dropped_error(records_of(peft_model, adapter))
            continue
        init = getattr(peft_model.peft_config[adapter], "init_lora_weights", None)
        records = records_of(peft_model, adapter)
        if records and asks_for_pissa(init):
            sidecar.write(folder, records, embeddings_of(peft_model))


def _warn_of_dropped_error(records: Mapping[str, InitRecord]) -> None:
    """Tell that a plain LoRA converted from a quantized residual lacks what the quantization has changed."""
    found = [record.report.quantization for record in records.values() if record.report.quantization is not None]
    if found:
        warnings.warn(
            f"the plain LoRA is the change to quantized residuals ({found[0].scheme}, {len(found)} layers). On the "
            "original weights it drops their quantization error E = W − W_q − s·B₀·A₀, ‖E‖_F = "
            f"{math.hypot(*(each.error for each in found)):.3g} over all layers, which training may have compensated "
            "for. merge_checkpoint keeps it",
            stacklevel=4,
        )


def _save_adapter(model: Any, adapter_name: str, state: dict[str, torch.Tensor], out: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    base = base_of(model)
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.init_lora_weights = True
    config.inference_mode = True
    config.base_model_name_or_path = str(out.resolve())
    # by these, PEFT's AutoPeftModel finds the class of the base model
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    folder.mkdir()
    config.save_pretrained(folder, auto_mapping_dict=mapping if config.task_type is None else None)
    tensors = {f"{KEY_PREFIX}{key}": value for key, value in state.items()}
    save_file(_apart(tensors), folder / WEIGHTS_NAME, metadata={"format": "pt"})


def _check_saves_tensors(base: Any) -> None:
    """Refuse a model whose ``save_pretrained`` writes the tensors under the names that PEFT has given them."""
    from transformers import PreTrainedModel

    if isinstance(base, PreTrainedModel) or not hasattr(base, "save_pretrained"):
        return
    if "state_dict" not in inspect.signature(base.save_pretrained).parameters:
        raise ValueError(
            f"save_pretrained of {type(base).__name__} takes no state_dict, so it would save PEFT's names of the "
            "tensors; save the trained adapter with its initial factors and convert it with convert_adapter instead"
        )


def _save_base(base: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    if isinstance(base, PreTrainedModel):
        with _without_adapters(base):
            base.save_pretrained(folder, state_dict=state)
    elif hasattr(base, "save_pretrained"):
        base.save_pretrained(folder, state_dict=state)
    else:
        save_file(_apart(state), folder / "model.safetensors")


@contextlib.contextmanager
def _without_adapters(base: Any) -> Iterator[None]:
    """Context in which a model of transformers saves the tensors that it is given, in this process alone.

    Not the adapters that it has of its own, and not those of its state dict, which it takes for a quantized model. It
    would gather a distributed model again with processes that are not here, and write nothing in any but the first.
    """
    others = {"_hf_peft_config_loaded": False, "hf_quantizer": None}
    found = {name: base.__dict__[name] for name in others if base.__dict__.get(name)}
    config = base.config.__dict__
    distributed = {name: config[name] for name in ("distributed_config",) if name in config}
    base.__dict__.update({name: others[name] for name in found})
    base.__dict__["should_save_on_this_rank"] = bool  # of is_main_process
    config.update(dict.fromkeys(distributed))
    try:
        yield
    finally:
        config.update(distributed)
        del base.__dict__["should_save_on_this_rank"]
        base.__dict__.update(found)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors in memory of their own, as safetensors needs them."""
    seen: set[int] = set()
    apart = {}
    for key, value in tensors.items():
        contiguous = value.detach().contiguous()
        memory = contiguous.untyped_storage().data_ptr()
        apart[key] = contiguous.clone() if memory in seen else contiguous
        seen.add(memory)
    return apart
