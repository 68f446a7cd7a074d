"""Standard output and standard error: in any encoding, and the first one with nothing but the result.

A finished run does not fail for a sign that a terminal lacks.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO

# What stands for the signs of our tables and messages; what Unicode itself decomposes, such as "₁", is not listed.
_ASCII = {
    "σ": "sigma", "Σ": "sum", "Δ": "d", "Ω": "Omega", "√": "sqrt", "‖": "||", "×": "x", "·": "*", "−": "-", "–": "-",
    "≤": "<=", "≥": ">=", "→": "->", "∞": "inf", "’": "'",
}  # fmt: skip
_NEAREST = "pissa_kernels.nearest"
_results: list[TextIO | None] = []  # within `reserved_stdout`, the stream for results


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """Error handler of a codec: the nearest ASCII text, or an escape sequence."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    if character in _ASCII:
        return _ASCII[character]
    decomposed = ""
    if unicodedata.category(character) not in ("Lu", "Ll", "Lo"):  # the letters of a name are escaped
        decomposed = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return decomposed or character.encode("ascii", "backslashreplace").decode()


def accept_all_text() -> None:
    """Let both streams print any text: signs that an encoding lacks become ASCII, and lone surrogates are escaped."""
    codecs.register_error(_NEAREST, _nearest)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_NEAREST)


@contextlib.contextmanager
def reserved_stdout() -> Iterator[None]:
    """Context in which :func:`output` alone prints to standard output, for a program that reads it.

    What Python code of other packages prints there goes to standard error: DeepSpeed, for example, logs when
    transformers imports it.
    """
    _results.append(_stdout())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def _stdout() -> TextIO | None:
    """The stream for results; None where the program was started with a closed one."""
    return _results[-1] if _results else sys.stdout


def output(text: str) -> None:
    """Print to standard output at once, so that a failure is reported by the command and not by Python at its exit.

    Raises:
        OSError: of the system, with the name of the stream.
    """
    try:
        if (stream := _stdout()) is not None:
            print(text, file=stream, flush=True)
    except OSError as error:
        abandon_stdout()
        error.filename = "standard output"
        raise


def abandon_stdout() -> None:
    """Send what is left of the output nowhere, once its reader is gone. Python would fail on it at its exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if (stream := _stdout()) is not None:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def one_line(text: str, most: int = 600) -> str:
    """Text as a single printable line of at most ``most`` characters. Control characters are escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"
