"""Values that several commands take, as argparse reads them: a bad one is told in words, with exit status 2."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def initializer(text: str) -> str:
    """An initializer: pissa, or pissa_niter_N."""
    from .checks import parse_init

    try:
        parse_init(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
