"""The module in which models pickled by version 0.1.0 look up their records; see :mod:`pissa_kernels.peft.record`."""

from .peft.record import InitRecord as Initial

__all__ = ["Initial"]
