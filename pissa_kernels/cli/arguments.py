"""Types of command-line arguments, exit statuses, and set-up that subcommands share."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

from .streams import one_line

EXIT_FAILED, EXIT_USAGE = 1, 2


def positive(text: str) -> int:
    """An integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def checked(text: str, check: Callable[[Any], object], kind: Callable[[str], Any] = str) -> Any:
    """The value of an argument, once ``check`` has accepted it: its ValueError is argparse's message."""
    try:
        check(value := kind(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def initializer(text: str) -> str:
    """An initializer: pissa, or pissa_niter_N."""
    from ..checks import parse_init

    return str(checked(text, parse_init))


def share(text: str) -> float:
    """A share of the captured energy, above 0 and at most 1."""
    from ..report.spectrum import check_share

    return float(checked(text, check_share, float))


def pattern(kind: type[int] | type[float]) -> Callable[[str], tuple[str, Any]]:
    """Type of an entry of PEFT's ``rank_pattern`` (NAME=R, an int) or ``alpha_pattern`` (NAME=A, a float)."""

    def parse(text: str) -> tuple[str, Any]:
        name, equals, value = text.rpartition("=")
        try:
            if not (equals and name):
                raise ValueError
            return name, kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME={'R' if kind is int else 'A'}") from None

    return parse


def quiet_libraries() -> None:
    """Silence the progress bars, logs and warnings of transformers and PEFT: what they raise is reported.

    The package's own warnings are one line, as its errors.
    """
    import transformers

    warnings.formatwarning = lambda message, *_, **__: f"pissa-kernels: warning: {one_line(str(message))}\n"
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    quiet_bitsandbytes()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def quiet_bitsandbytes() -> None:
    """Silence bitsandbytes' warning of a kernel that is not installed, which it does without."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
