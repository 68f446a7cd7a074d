"""What counts as a refusal, and what as a failure, in a walk through operations."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import peft

import pissa_kernels as pk


class Divergence(AssertionError):
    """The model computes something else than its reference, or a refusal is not one."""


def documented(error: Exception) -> bool:
    """Whether an exception is a refusal of this package that names a layer or an adapter, or says there is none."""
    if not isinstance(error, (ValueError, TypeError, RuntimeError)):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ours = trace is not None and str(Path(pk.__file__).parent) in trace.tb_frame.f_code.co_filename
    return (
        ours and "\n" not in str(error) and bool(re.search(r"(layer|adapter)s? '|no layer of this model", str(error)))
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without PEFT's warnings, one for nearly every step, and without its model cards, which are slow."""
    with warnings.catch_warnings(), mock.patch.object(peft.PeftModel, "create_or_update_model_card"):
        warnings.simplefilter("ignore")
        yield
