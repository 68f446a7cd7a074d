"""Finding the targets in a process of its own: transformers and PEFT are imported there, and not here.

They take seconds of one core to import. In another process that holds up nobody: this one has its interpreter to itself
for :mod:`pissa_kernels.checkpoint.ahead`, and stays as small as torch.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import multiprocessing
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..files.folder import Checkpoint
from .targets import Adapter, AdapterOptions, find_targets

SECONDS_TO_END = 5


class Planner:
    """Context: a process that is finding the targets of a checkpoint; it ends with the context, if not before.

    To be entered before there are threads: where the system can, the process is a copy of this one, so that torch is
    not imported a second time.

    Args:
        checkpoint, options: as :func:`pissa_kernels.checkpoint.targets.find_targets` takes them.
    """

    def __init__(self, checkpoint: Checkpoint, options: AdapterOptions) -> None:
        # other systems' libraries do not bear being copied
        processes: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._here, self._there = processes.Pipe(duplex=False)
        arguments = (self._here, self._there, checkpoint, options)
        self._process = processes.Process(target=_answer, args=arguments, daemon=True)

    def __enter__(self) -> Planner:
        self._process.start()
        self._there.close()  # or the end of the process would not be seen
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()  # it has nothing to put away
        self._process.join()
        self._here.close()

    def adapter(self) -> Adapter:
        """Wait for the answer.

        Raises:
            ImportError, OSError, TypeError, ValueError: as :func:`find_targets`.
            RuntimeError: the process has ended without an answer.
        """
        try:
            answer, trace = self._here.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(
                f"the process that asks transformers and PEFT has died with exit code {self._process.exitcode}"
            ) from None
        # what it took of the processor is counted from here on; whatever else may keep it is not waited for
        self._process.join(SECONDS_TO_END)
        if isinstance(answer, Exception):
            raise answer from RuntimeError(f"in the process that asks transformers and PEFT:\n{trace}")
        found: Adapter = answer
        return found


def may_fork() -> bool:
    """Whether this process can be copied: it may have children, and no thread's lock would be found taken in the copy.

    So it is in the command; a program that calls the command's ``main`` may be anything.
    """
    return threading.active_count() == 1 and not multiprocessing.current_process().daemon


def quiet_transformers() -> None:
    """No advice and no bars from other packages: they are no part of a command's output."""
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def _answer(here: Connection, there: Connection, checkpoint: Checkpoint, options: AdapterOptions) -> None:
    """What the process does: send (adapter or exception, traceback)."""
    here.close()  # so that a parent that has died is noticed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    # the collector would walk the objects of all imports again and again, a third of their time, and find no garbage
    gc.disable()
    torch.set_num_threads(1)  # a copy has the names of its parent's threads, not the threads
    try:
        quiet_transformers()
        answer: tuple[Adapter | Exception, str] = find_targets(checkpoint, options), ""
    except Exception as error:
        answer = _portable(error), traceback.format_exc()
    with contextlib.suppress(OSError):  # nobody is there any more
        there.send(answer)


def _portable(error: Exception) -> Exception:
    """The exception, if pickle takes it and any process knows its class; else the nearest that does, of its text."""
    kinds = [kind for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind]
    with contextlib.suppress(Exception):
        if kinds[0] is type(error):
            pickle.dumps(error)
            return error
        nearest: Exception = kinds[0](str(error))
        return nearest
    return RuntimeError(str(error))
