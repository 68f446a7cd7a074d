"""A progress bar that counts layers and shows the speed in bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

Tick = Callable[[str, int], None]


@contextmanager
def progress(total: int, description: str, *, unit: str = "layer", shown: bool = True) -> Iterator[Tick]:
    """Context with a bar on stderr: ``with progress(total, description) as tick: …; tick(name, nbytes)``.

    The bar shows the number of finished layers, the time left, the average speed since the start in GB/s (10⁹ bytes)
    and the name of the last layer. It is cleared at the end. Without tqdm, or where stderr is not a terminal, nothing
    is shown.

    Args:
        total: number of layers.
        description: text before the bar.
        unit: what is counted.
        shown: False to show nothing on a terminal either.

    Yields:
        ``tick(name, nbytes)``, to be called after each layer: its name, and the bytes of its weight that were read or
        written, 0 if not known.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None:
        yield lambda name, nbytes: None
        return
    began, done = perf_counter(), 0
    # disable=None disables the bar where the file is not a terminal
    with tqdm(
        total=total, desc=description, unit=unit, leave=False, disable=None if shown else True, file=sys.stderr
    ) as bar:

        def tick(name: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            seconds = perf_counter() - began
            speed = f"{done / seconds / 1e9:.2f} GB/s, " if done and seconds > 0 else ""
            bar.set_postfix_str(speed + name, refresh=False)
            bar.update()

        yield tick
