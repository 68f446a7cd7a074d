"""A progress bar for work that is counted in layers and measured in bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

Tick = Callable[[str, int], None]


@contextmanager
def progress(total: int, description: str, *, unit: str = "layer", shown: bool = True) -> Iterator[Tick]:
    """A bar on stderr: ``with progress(total, description) as tick: tick(name, nbytes)`` after each layer.

    It shows the layers done, the time left, GB/s (10⁹ bytes, over all the time since the start) and the name of the
    last layer, and is gone at the end. Nothing is shown where stderr is not a terminal or tqdm is not installed.

    Args:
        total: layers to do.
        description: what is done, before the bar.
        unit: what is counted.
        shown: False for none anywhere.

    Yields:
        tick(name, nbytes): a layer is done; ``nbytes`` of its weight were read or written, 0 where that is not known.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None:
        yield lambda name, nbytes: None
        return
    began, done = perf_counter(), 0
    # disable=None: not where the file is no terminal
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
