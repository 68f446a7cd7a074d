"""Where models pickled by version 0.1.0 look up their records; see :mod:`pissa_kernels.peft.weights.record`."""

from .peft.weights.record import InitRecord as Initial

__all__ = ["Initial"]
