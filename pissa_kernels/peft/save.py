"""Saving: the residual model with its untrained adapter, and what a trained adapter needs beside it."""

from __future__ import annotations

import copy
import inspect
import os
import weakref
from pathlib import Path
from typing import Any

import torch

from ..adapter.layers import lora_layers
from ..adapter.names import ADAPTER_FOLDER, factor_key
from ..files.atomic import atomic_file, atomic_folder
from ..report import REPORT_NAME
from . import sidecar
from .record import InitRecord, of_adapter


def save_pissa(
    peft_model: Any, out: str | os.PathLike[str], *, adapter_name: str = "default", tokenizer: Any = None
) -> None:
    """Save the residual model, and in ``pissa_init/`` its initial adapter, as plain transformers and PEFT load them.

    PEFT's recipe, with no second SVD: the adapter's config says ``init_lora_weights=True``, so loading it onto the
    residual model subtracts nothing. The adapter is the initial one whether or not training has gone on since, and
    ``pissa_init/`` is what ``save_pretrained(…, path_initial_model_for_weight_conversion=…)`` takes. Everything is
    written beside ``out`` first and renamed at the end; the model itself is not changed.

    Args:
        peft_model: with an adapter that was initialised under :func:`pissa_kernels.patch_peft`.
        out: a folder that does not exist or is empty.
        adapter_name: of the adapter.
        tokenizer: saved along, if given.

    Raises:
        FileExistsError: ``out`` holds something.
        ValueError: there is no such adapter, it was not initialised here, or one is merged into the weights.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder")
    initials = initial_factors(peft_model, adapter_name)
    if not initials:
        raise ValueError(
            f"the adapter {adapter_name!r} was not initialised by pissa_kernels (adapters: "
            f"{', '.join(getattr(peft_model, 'peft_config', ())) or 'none'}); make or load the model under patch_peft()"
        )
    for name, layer in lora_layers(peft_model):
        if layer.merged:
            raise ValueError(f"an adapter is merged into the weight of layer {name!r}; unmerge it first")
    with atomic_folder(out) as staging:
        _save_initial_adapter(peft_model, adapter_name, initials, out, staging)
        sidecar.report_of(initials).write(staging / ADAPTER_FOLDER / REPORT_NAME)
        _save_residual(peft_model.get_base_model(), staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


def initial_factors(peft_model: Any, adapter_name: str) -> dict[str, InitRecord]:
    """What was taken out of each layer for one adapter, by the layer's name in the base model."""
    found = {name: of_adapter(layer, adapter_name) for name, layer in lora_layers(peft_model)}
    return {name: initial for name, initial in found.items() if initial is not None}


class SavePretrained:
    """``save_pretrained`` of one ``PeftModel`` that was made under the hook: PiSSA adapters get their sidecar.

    An attribute of the model, which is saved when the patch is long over. It is copied and pickled with the model, and
    does not keep it alive. See :mod:`pissa_kernels.peft.sidecar`; an adapter converted to plain LoRA needs none,
    and gets what PEFT's conversion leaves out: whatever was trained besides A and B, such as a classifier's head.
    """

    def __init__(self, peft_model: Any) -> None:
        self._model = weakref.ref(peft_model)

    def __getstate__(self) -> Any:
        return self._model()

    def __setstate__(self, peft_model: Any) -> None:
        self._model = weakref.ref(peft_model)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        peft_model: Any = self._model()
        save = type(peft_model).save_pretrained
        save(peft_model, *args, **kwargs)
        call = inspect.signature(save).bind(peft_model, *args, **kwargs)
        call.apply_defaults()
        arguments = call.arguments
        if not arguments["is_main_process"]:
            return
        for adapter in arguments["selected_adapters"] or list(peft_model.peft_config):
            folder = Path(arguments["save_directory"]) / ("" if adapter == "default" else adapter)
            if arguments["path_initial_model_for_weight_conversion"] is not None:
                _complete_conversion(peft_model, adapter, folder, arguments)
                continue
            init = getattr(peft_model.peft_config[adapter], "init_lora_weights", None)
            initials = initial_factors(peft_model, adapter)
            if initials and isinstance(init, str) and init.startswith("pissa"):
                sidecar.write(folder, initials)


def _complete_conversion(peft_model: Any, adapter: str, folder: Path, arguments: dict[str, Any]) -> None:
    """Add what PEFT's conversion drops, trained modules and DoRA's magnitudes: all but LoRA's own factors.

    PEFT 0.21 writes A and B only, so that a converted classifier does not load, and magnitudes are back at their start.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    safe = arguments["safe_serialization"]
    path = folder / (SAFETENSORS_WEIGHTS_NAME if safe else WEIGHTS_NAME)
    trained = get_peft_model_state_dict(
        peft_model,
        state_dict=arguments.get("kwargs", {}).get("state_dict"),
        adapter_name=adapter,
        save_embedding_layers=arguments["save_embedding_layers"],
    )
    converted = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    factors = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    missing = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in trained.items()
        if key not in converted and not any(factor in key for factor in factors)
    }
    if not missing:
        return
    with atomic_file(path) as temporary:
        if safe:
            save_file({**converted, **missing}, temporary, metadata={"format": "pt"})
        else:
            torch.save({**converted, **missing}, temporary)


def _save_initial_adapter(
    peft_model: Any, adapter_name: str, initials: dict[str, InitRecord], out: Path, staging: Path
) -> None:
    state = peft_model.state_dict()
    for name, initial in initials.items():
        state[factor_key(name, "A", adapter_name)] = initial.lora_A
        state[factor_key(name, "B", adapter_name)] = initial.lora_B
    config = peft_model.peft_config[adapter_name]
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    plain.base_model_name_or_path = str(out.resolve())
    peft_model.peft_config[adapter_name] = plain
    try:
        # the residual has the embeddings; "auto" would look for a resized vocabulary in a folder that is yet to come
        type(peft_model).save_pretrained(
            peft_model,
            staging / ADAPTER_FOLDER,
            selected_adapters=[adapter_name],
            save_embedding_layers=False,
            state_dict=state,
        )
    finally:
        peft_model.peft_config[adapter_name] = config
    if adapter_name != "default":  # PEFT puts others one level deeper
        for path in (staging / ADAPTER_FOLDER / adapter_name).iterdir():
            os.replace(path, staging / ADAPTER_FOLDER / path.name)
        (staging / ADAPTER_FOLDER / adapter_name).rmdir()


def _save_residual(base: Any, staging: Path) -> None:
    """The base model's weights under the names that they had before PEFT wrapped its layers."""
    state: dict[str, torch.Tensor] = {}
    for key, value in base.state_dict().items():
        parts = key.split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            continue
        state[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = value
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(staging, state_dict=state)
        return
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, staging / "model.safetensors")
