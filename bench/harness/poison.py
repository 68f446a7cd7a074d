"""NaN in every tensor that ``torch.empty`` returns."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what ``empty`` returns with NaN.

    Otherwise a new output may reuse the memory of an earlier, correct one, and elements that a kernel never writes look
    correct.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuBLAS warns about a workspace setting that changes nothing here
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
