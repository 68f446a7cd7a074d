"""``merge_checkpoint``: a checkpoint and an adapter that was trained on it in, a full 16-bit checkpoint out.

The weight of an adapted layer becomes W + s·B·A, with W a residual, a plain weight, or the values of a quantized one.
One weight per worker is in memory at a time.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..files.apart import check_apart
from ..files.atomic import atomic_folder, copy_file, write_text
from ..files.destination import check_deletable, destination
from ..files.header import read_header
from ..files.system import flush
from ..runtime.progress import progress as progress_bar
from ..runtime.workers import run_jobs
from .plan import MARK, MergeJob, plan_merge
from .report import MergedLayer, MergeReport
from .write import open_files

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def merge_checkpoint(
    out: str | os.PathLike[str],
    trained: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    workers: int | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> MergeReport:
    """Merge a trained adapter into the checkpoint that it was trained on, without loading the model.

    ``out`` may be a residual checkpoint of :func:`pissa_kernels.init_checkpoint`, quantized or not, or any checkpoint
    in safetensors with a LoRA that was trained on it. ``merged`` becomes a full checkpoint: every adapted weight is
    W + s·B·A, summed in float32 and rounded once; weights in NF4, FP4 or int8 are dequantized, whether they are adapted
    or not; trained copies of whole modules replace those of ``out``; everything else is copied. One weight per worker
    is in memory at a time. The result appears complete or not at all.

    Args:
        out: folder of the checkpoint.
        trained: folder of the adapter.
        merged: folder of the result. It may exist empty.
        dtype: "bfloat16", "float16", "float32" or the torch dtype, for all floating-point tensors. By default each
            tensor keeps its own, a weight in 4 bits gets the one that it is dequantized to, and one in int8 that of the
            model.
        workers: tensors at a time; None for as many as torch has threads.
        force: replace a result of this function in ``merged`` that holds no other files.
        trust_remote_code: run the Python code that comes with the checkpoint, if its model has to be built to find its
            weights.
        progress: show a bar where stderr is a terminal.

    Returns:
        The report of all layers.

    Raises:
        FileExistsError: ``merged`` holds something, is no folder or a mount point, or lies in, under or above what is
            read.
        FileNotFoundError, NotADirectoryError: a file or folder is missing.
        OSError: reading or writing failed. Nothing has been written to ``merged`` then.
        TypeError, ValueError: a file is damaged; the adapter was not trained on ``out``, or is more than s·B·A for each
            layer; a factor or the result is not finite. The message names the layer or the tensor.

    Examples:
        >>> import pathlib, tempfile, torch, transformers
        >>> import pissa_kernels as pk
        >>> config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        ...     num_attention_heads=2, vocab_size=64)
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
        >>> _ = pk.init_checkpoint(folder / "base", folder / "out", rank=4, target_modules=["q_proj", "v_proj"])
        >>> report = pk.merge_checkpoint(folder / "out", folder / "out/pissa_init", folder / "merged")
        >>> [(layer.name, layer.rank) for layer in report.layers]
        [('model.layers.0.self_attn.q_proj', 4), ('model.layers.0.self_attn.v_proj', 4)]
    """
    out, trained, merged = Path(out), Path(trained), Path(merged)
    kind = _dtype(dtype)
    folder = destination(merged)
    job = plan_merge(out, trained, kind, trust_remote_code)
    check_apart([folder], [out, trained])
    check = partial(_check_replaceable, job, force=force)
    check(folder)
    before = job.checkpoint.fingerprint()
    with atomic_folder(folder, replace=check if force else None) as temporary:
        _write_tensors(job, temporary, workers or torch.get_num_threads(), progress)
        for name in job.files:
            copy_file(out / name, temporary / name)
        for name, text in job.texts.items():
            write_text(temporary / name, text)
        flush(temporary)
        if job.checkpoint.fingerprint() != before:
            raise ValueError(f"{out} has changed during the merge; merge again")
    flush(folder.resolve().parent)
    return _report(job, merged)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if (dtype is not None and found is None) or found not in (None, *DTYPES.values()):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return found


def _check_replaceable(job: MergeJob, folder: Path, *, force: bool) -> None:
    """Refuse to replace anything but a result of a merge, and that without ``force``."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{folder} exists and is not an empty folder; force replaces what merge wrote")
    check_deletable(folder, job.names(), "this merge")
    for name in job.headers:
        try:
            ours = MARK.items() <= read_header(folder / name).metadata.items()
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise FileExistsError(
                f"{folder / name} is not as merge writes it and would be lost; move it away, or choose another folder"
            )


def _write_tensors(job: MergeJob, folder: Path, workers: int, progress: bool) -> None:
    infos = {key: (shard, info) for shard, header in job.headers.items() for key, info in header.tensors.items()}
    # the tensors of a stack share its factors
    groups: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for key, values in job.values.items():
        groups[(key, False) if values.piece is None else (str(values.layer), True)].append(key)
    largest_first = sorted(groups.items(), key=lambda group: -sum(infos[key][1].nbytes for key in group[1]))
    threads = torch.get_num_threads()
    with open_files(job, folder) as files, progress_bar(len(infos), "merge", unit="tensor", shown=progress) as tick:

        def one(name: str, stack: bool, keys: list[str], emit: Callable[[tuple[str, int]], None]) -> None:
            torch.set_num_threads(1)  # of this thread, and of MKL in the whole process
            if stack:
                places = [(infos[key][0], key) for key in keys]
                files.write_stack(name, places, lambda key: emit((key, infos[key][1].nbytes)))
            else:
                files.write(infos[name][0], name)
                emit((name, infos[name][1].nbytes))

        try:
            run_jobs([partial(one, *group, keys) for group, keys in largest_first], workers, lambda done: tick(*done))
        finally:
            torch.set_num_threads(threads)


def _report(job: MergeJob, merged: Path) -> MergeReport:
    infos = {key: info for header in job.headers.values() for key, info in header.tensors.items()}
    keys: dict[str, list[str]] = defaultdict(list)
    for key, values in job.values.items():
        if values.layer is not None:
            keys[values.layer].append(key)
    layers = []
    for name, layer in job.adapter.layers.items():
        info, stored = infos[keys[name][0]], job.values[keys[name][0]].stored
        dtype = str(info.torch_dtype).removeprefix("torch.")
        kind = None if stored is None else stored.kind
        layers.append(
            MergedLayer(name, info.name, info.shape, dtype, layer.rank, layer.scaling, kind, tensors=len(keys[name]))
        )
    changed = [values for values in job.values.values() if values.stored or values.layer or values.copy]
    return MergeReport(
        layers=layers,
        out=merged,
        dequantized=sum(values.stored is not None for values in changed),
        replaced=[key for key, values in job.values.items() if values.copy is not None],
        copied=len(job.values) - len(changed),
        size=sum(header.size for header in job.headers.values()),
        notes=list(job.notes),
    )
