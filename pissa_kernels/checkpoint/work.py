"""The work of one process: take tensors that no other process has taken, and journal each once it is written."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable

import torch

from ..numerics import exact_arithmetic
from ..runtime.distributed import ProcessGroup
from ..runtime.progress import progress as progress_bar
from ..runtime.workers import run_jobs
from .journal import Journal
from .plan import CheckpointJob, TensorJob
from .publish import by_tensor
from .worker import Record, Worker

CPU = torch.device("cpu")


class Tensors:
    """The tensors of a job, the longest work first, each for one thread of one process of the run.

    A thread takes the next one when it is free. So hosts of any speed end together, to within a short tensor, and what
    is left of an interrupted run is divided anew.

    Args:
        job: the checkpoint.
        group: the processes.
        workers: threads in this process.
        will_need: called with a tensor that is taken later.
    """

    def __init__(
        self, job: CheckpointJob, group: ProcessGroup, workers: int, will_need: Callable[[TensorJob], None]
    ) -> None:
        self._tensors, self._group, self._workers, self._will_need = job.tensors, group, workers, will_need
        self._ahead: deque[int] = deque()
        # the last ones are not taken ahead: they are for the process that is free first
        self._last_ahead = len(job.tensors) - 2 * workers * group.world
        self._in_work: list[str] = []
        self._lock = threading.Lock()

    def take(self) -> TensorJob | None:
        """The next tensor; None if all are taken."""
        with self._lock:
            index = self._ahead.popleft() if self._ahead else self._group.claim()
            tensor = self._tensors[index] if index < len(self._tensors) else None
            self._in_work += [tensor.info.name] if tensor else []
            self._group.tell(list(self._in_work))
            while len(self._ahead) < self._workers and index < self._last_ahead:
                index = self._group.claim()
                if index < len(self._tensors):
                    self._ahead.append(index)
                    self._will_need(self._tensors[index])
            return tensor

    def finished(self, tensor: TensorJob) -> None:
        """A tensor is written. The others are told when its thread takes the next one."""
        with self._lock:
            self._in_work.remove(tensor.info.name)


def work(
    job: CheckpointJob,
    journal: Journal,
    group: ProcessGroup,
    workers: int | None,
    on_tensor: Callable[[Record], None] | None,
    progress: bool,
) -> int:
    """Work on tensors until all are taken. Returns the number of those here that an earlier run had written."""
    device = CPU if job.device == "cpu" else torch.device(job.device, group.local % torch.cuda.device_count())
    threads = torch.get_num_threads()
    workers = workers or (threads if device == CPU else 2)
    recorded = by_tensor(journal.records())
    kept, stop = 0, threading.Event()
    with Worker(job, journal.out, device, journal.fence) as worker, journal.open(group.rank) as lines:
        tensors = Tensors(job, group, workers, worker.will_need)

        def work_on_tensors(emit: Callable[[tuple[TensorJob, Record, bool]], None]) -> None:
            torch.set_num_threads(1)  # of this thread, and of MKL in the whole process
            while not stop.is_set() and (tensor := tensors.take()) is not None:
                record = next((line for line in recorded.get(tensor.key, ()) if worker.holds(tensor, line)), None)
                emit((tensor, record or worker.run(tensor), record is not None))
                tensors.finished(tensor)

        def done(finished: tuple[TensorJob, Record, bool]) -> None:
            nonlocal kept
            tensor, record, held = finished
            group.check()
            if held:
                kept += 1
            else:
                journal.fence()
                lines.write(json.dumps(record) + "\n")
                lines.flush()
            tick(tensor.info.name, tensor.nbytes)
            for _ in range(group.taken_elsewhere()):
                tick(tensor.info.name, 0)
            if on_tensor is not None:
                on_tensor({**record, "kept": held})

        with (
            # the tensors of all processes: how many are taken here is not known before
            progress_bar(len(job.tensors), "PiSSA", unit="tensor", shown=progress and group.first) as tick,
            exact_arithmetic(device),
        ):
            try:
                check = group.check if group.world > 1 else None
                run_jobs([work_on_tensors] * min(workers, len(job.tensors)), workers, done, stop, check)
            except BaseException:
                group.close_claims()  # the run has failed: the others need not do the rest
                raise
            finally:
                torch.set_num_threads(threads)
    return kept
