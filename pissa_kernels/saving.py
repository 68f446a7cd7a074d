"""Where models pickled by version 0.1.0 look up their method; see :mod:`pissa_kernels.peft.saving.save`."""

from .peft.saving.save import SavePretrained

__all__ = ["SavePretrained"]
