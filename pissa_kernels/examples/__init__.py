"""Examples that take a minute or two on a CPU: ``python -m pissa_kernels.examples.plain`` and ``….trainer``."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path


def quiet() -> None:
    """Silence transformers' progress bars, and warnings that do not apply to the examples."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # raised by PEFT's own conversion, which loads the initial adapter beside the trained one
    warnings.filterwarnings("ignore", message="PiSSA changes the base weights of the model")


def count(text: str) -> int:
    """Parse an integer of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def new_folder(text: str) -> Path:
    """Parse the path of a folder that does not exist or is empty, for argparse."""
    path = Path(text)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"{text} exists and is not an empty folder")
    return path
