"""Models pickled by version 0.1.0 name their ``save_pretrained`` by this module; see :mod:`pissa_kernels.peft.save`."""

from .peft.save import SavePretrained

__all__ = ["SavePretrained"]
