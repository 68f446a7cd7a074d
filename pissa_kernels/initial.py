"""Models pickled by version 0.1.0 name their records by this module; see :mod:`pissa_kernels.peft.record`."""

from .peft.record import InitRecord as Initial

__all__ = ["Initial"]
