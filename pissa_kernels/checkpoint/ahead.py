"""What any plan will most likely want, decomposed while transformers and PEFT are still asked for the plan.

It is a guess that costs nothing but cores that would be idle. What the plan then wants otherwise is dropped; what it
wants just so has the bits that :class:`pissa_kernels.checkpoint.work.Worker` would have computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files import buffer
from ..files.folder import Checkpoint
from ..files.header import Entry, read_tensor
from ..numerics import exact_arithmetic
from ..ops import WEIGHT_DTYPES
from ..pissa import Factors
from ..runtime.memory import Peak
from .plan import Plan, in_order
from .targets import AdapterOptions, Target, module_names

# Of A and B in all; what would be more is not begun.
KEPT_BYTES = 64 << 20
ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Done:
    """One weight's part.

    Attributes:
        factors: of the weight; A and B in the dtype that they will be stored in, which holds them exactly.
        seconds: that reading and decomposing it took.
    """

    factors: Factors
    seconds: float

    def widened(self) -> Factors:
        """As :func:`pissa_kernels.pissa.principal_factors` gave them."""
        found = self.factors
        return Factors(found.lora_A.float(), found.lora_B.float(), found.singular_values.clone(), found.certificate)


class Ahead:
    """Context: threads that decompose the likely targets of a checkpoint on the CPU, the longest work first.

    Args:
        checkpoint, options: of the plan to be.
        workers: threads of the run, two or more; while the plan is made, all but the one whose core that takes.

    Attributes:
        pool: of these threads. They go over to the run one by one, and no others are needed: each keeps the memory of
            its largest weight.
        began: when, by ``time.perf_counter``.
        peak: of this process' memory since then.
        taken: the number of weights that were of use.
    """

    def __init__(self, checkpoint: Checkpoint, options: AdapterOptions, workers: int) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._fingerprint = checkpoint.fingerprint()
        self.began, self.peak = time.perf_counter(), Peak()
        self.taken = 0
        self._stopped = False
        # one block, of which the system gives what is written to: small ones that are kept would lie between the
        # weights that come and go, and no weight would fit where the last one was
        self._memory, self._used = torch.empty(KEPT_BYTES, dtype=torch.uint8), 0
        self._lock = threading.Lock()
        guesses = in_order(checkpoint, list(_guesses(checkpoint, options)), options, "cpu")
        self._jobs = {
            (item.shard, item.entry.name): (item.target, Future[Done]()) for item in guesses if item.target is not None
        }
        self._next = iter(list(self._jobs.values()))
        self._workers, self._threads = workers, torch.get_num_threads()
        self.pool = ThreadPoolExecutor(workers, "pissa_kernels", torch.set_num_threads, (1,))

    def __enter__(self) -> Ahead:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.peak)
            stack.enter_context(exact_arithmetic(torch.device("cpu")))
            stack.callback(torch.set_num_threads, self._threads)  # MKL's number is the process's
            stack.callback(self.pool.shutdown)
            stack.callback(self.stop)
            for _ in range(self._workers - 1):
                self.pool.submit(self._work)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def stop(self) -> None:
        """Begin no other one; those under way are finished."""
        self._stopped = True

    def serves(self, plan: Plan) -> bool:
        """Whether this is of the plan's source, as it is still there, and of its options."""
        asked = plan.checkpoint.folder, plan.options, plan.device
        mine = self._checkpoint.folder, self._options, "cpu"
        return asked == mine and plan.checkpoint.fingerprint() == self._fingerprint

    def take(self, target: Target) -> Done | None:
        """What is known of a target, which may be waited for; None where it is to be computed, and when asked again."""
        guess, job = self._jobs.pop((target.shard, target.entry.name), (None, None))
        if guess is None or job is None or dataclasses.replace(guess, name=target.name) != target:
            return None
        # what cannot be decomposed is left to the plan, which knows the layer's name
        if job.cancel() or job.exception() is not None:
            return None
        with self._lock:
            self.taken += 1
        return job.result()

    def _work(self) -> None:
        while not self._stopped:
            with self._lock:
                target, job = next(self._next, (None, None))
            if target is None or job is None or (parts := self._room(target)) is None:
                return
            if not job.set_running_or_notify_cancel():
                continue
            try:
                job.set_result(self._decompose(target, parts))
            except BaseException as error:
                job.set_exception(error.with_traceback(None))  # which would keep the weight

    def _decompose(self, target: Target, parts: Sequence[Tensor]) -> Done:
        began = time.perf_counter()
        descriptor = os.open(self._checkpoint.folder / target.shard, os.O_RDONLY)
        try:
            weight = read_tensor(descriptor, target.entry, buffer.weights)
        finally:
            os.close(descriptor)
        found = target.factors(weight, self._options)
        A, B, S = (
            part.copy_(whole)
            for part, whole in zip(parts, (found.lora_A, found.lora_B, found.singular_values), strict=True)
        )
        return Done(Factors(A, B, S, found.certificate), time.perf_counter() - began)

    def _room(self, target: Target) -> list[Tensor] | None:
        """Where A, B and singular values of a target are to be kept; None where there is no room for them."""
        (m, n), rank = target.shape, target.rank
        shapes = [((rank, n), target.dtype), ((m, rank), target.dtype), ((rank,), torch.float32)]
        found = []
        with self._lock:
            used = self._used
            for shape, dtype in shapes:
                nbytes = dtype.itemsize * torch.Size(shape).numel()
                if used + nbytes > KEPT_BYTES:
                    return None
                found.append(self._memory[used : used + nbytes].view(dtype).view(shape))
                used += nbytes + -nbytes % ALIGNMENT
            self._used = used
        return found


def _guesses(checkpoint: Checkpoint, options: AdapterOptions) -> Iterator[Target]:
    """Every matrix of a numbered layer that the options name."""
    rank = options.rank
    alpha = rank if options.alpha is None else options.alpha
    scaling = float(alpha / (math.sqrt(rank) if options.use_rslora else rank))
    for tensor, (shard, entry) in checkpoint.tensors().items():
        name = tensor.removesuffix(".weight")
        if (
            name != tensor
            and any(map(str.isdigit, name.split(".")))
            and _is_matrix(entry, rank)
            and _names(options.target_modules, name)
            and not _names(options.exclude_modules, name)
        ):
            yield Target(name, shard, entry, False, rank, scaling)


def _is_matrix(entry: Entry, rank: int) -> bool:
    return len(entry.shape) == 2 and entry.torch_dtype in WEIGHT_DTYPES and rank <= min(entry.shape)


def _names(modules: tuple[str, ...], name: str) -> bool:
    """Whether the options' modules have this one among them, as PEFT reads them."""
    names = module_names(modules)
    if isinstance(names, str):
        with contextlib.suppress(re.error):  # PEFT refuses it
            return names == "all-linear" or re.fullmatch(names, name) is not None
        return False
    return any(f".{name}".endswith(f".{one}") for one in names)
