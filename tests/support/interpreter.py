"""Triton's interpreter, made to convert as the hardware does.

From float32 to bfloat16 the interpreter truncates, where every GPU rounds to nearest, ties to even; and it takes
subnormal bfloat16 numbers for zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def convert_as_hardware() -> None:
    """Patch the interpreter, where triton is installed and interprets."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    builder: Any = interpreter.InterpreterBuilder
    narrow, widen = builder.create_fp_trunc, builder.create_fp_ext

    def create_fp_trunc(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16 or source.dtype.scalar != tl.float32:
            return narrow(self, source, target)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(values.view(torch.int16).numpy().view(np.uint16), target.scalar)

    def create_fp_ext(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.bfloat16 or target.scalar != tl.float32:
            return widen(self, source, target)
        bits = source.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), target.scalar)

    builder.create_fp_trunc = create_fp_trunc
    builder.create_fp_ext = create_fp_ext
