"""The module in which models pickled by version 0.1.0 look up their method; see :mod:`pissa_kernels.peft.save`."""

from .peft.save import SavePretrained

__all__ = ["SavePretrained"]
