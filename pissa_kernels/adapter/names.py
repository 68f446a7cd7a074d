"""File names and tensor keys of an adapter as PEFT saves it.

An adapter folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. The keys of a layer are
``base_model.model.<module>.lora_A.weight`` (r, in) and ``base_model.model.<module>.lora_B.weight`` (out, r).
"""

from __future__ import annotations

# The folder inside a residual checkpoint that holds the initial adapter.
ADAPTER_FOLDER = "pissa_init"
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# PEFT wraps the base model twice, as PeftModel.base_model.model.
KEY_PREFIX = "base_model.model."
# Where FSDP1, activation checkpointing and torch.compile hold the module that they have put their own around.
AROUND = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def own_name(name: str) -> str:
    """Name of a module, parameter or key without the parts that wrappers have added.

    A model wrapped for the training has the names of the model that loads its files in another process.

    Examples:
        >>> from pissa_kernels.adapter.names import own_name
        >>> own_name("model.layers.0._checkpoint_wrapped_module.mlp._orig_mod.up_proj")
        'model.layers.0.mlp.up_proj'
    """
    return ".".join(part for part in name.split(".") if part not in AROUND)


def module_name(key: str) -> str:
    """Name of a module in the base model, from its name in the PEFT model or from its key in an adapter's file."""
    return key.removeprefix(KEY_PREFIX)


def factor_key(module: str, factor: str, adapter: str = "") -> str:
    """Key of one factor of a layer.

    Args:
        module: the layer's name in the base model.
        factor: "A" or "B".
        adapter: the adapter's name, which a model's state dict has in the key and an adapter's file does not.
    """
    return f"{KEY_PREFIX}{module}.lora_{factor}.{f'{adapter}.' if adapter else ''}weight"
