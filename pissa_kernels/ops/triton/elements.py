"""Triton's dtypes of weights, for kernels that read from a table of addresses, which have no dtype."""

from __future__ import annotations

import torch
import triton.language as tl

ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
