"""``init_checkpoint``: a checkpoint in, its residual and its adapter out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..quantize.iteration import DEFAULT_ITERATIONS, Iterations
from ..runtime.contact import ProcessLost
from ..runtime.distributed import ProcessGroup, joined
from ..runtime.memory import Peak
from .journal import Journal
from .options import AdapterOptions, default_modules, entries
from .outcome import CheckpointReport, checkpoint_report
from .placement import is_result_of
from .plan import CheckpointJob, plan_checkpoint
from .publish import collect_records, publish
from .quantization import DEFAULT_BLOCK, quantization_options
from .work import work
from .worker import Record


def init_checkpoint(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    target_parameters: Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    init: str = "pissa",
    seed: int = 0,
    trust_remote_code: bool = False,
    quantize: str | None = None,
    double_quant: bool = False,
    quant_block: int = DEFAULT_BLOCK,
    quant_iterations: Iterations = DEFAULT_ITERATIONS,
    nuclear: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    on_plan: Callable[[CheckpointJob], None] | None = None,
    on_tensor: Callable[[Record], None] | None = None,
) -> CheckpointReport:
    """Turn a checkpoint folder into its residual and a PiSSA adapter, without loading the model.

    ``out`` becomes a checkpoint with the names, dtypes, shards and index of the source, in which the weights of the
    adapted layers are residuals; ``out/pissa_init`` holds the adapter. Plain transformers and PEFT load both. One
    weight per worker is in memory at a time, or one matrix of a stack. The result appears complete or not at all. Each
    weight is decomposed by one thread, so the bytes depend on the kind of CPU or GPU, not on the number of workers or
    processes. Under torchrun every process calls this on a folder that all share.

    With ``quantize``, ``out`` is a pre-quantized bitsandbytes checkpoint instead: the layers that transformers would
    quantize are stored as it stores them, with the residual where a layer is adapted.

    Args:
        model: folder with config.json and safetensors.
        out: folder of the result. It may exist empty; a symbolic link to a folder is followed, and a mount point is
            written into.
        rank: r of every layer.
        alpha: ``lora_alpha``; None for the rank, a scaling of 1.
        target_modules: names of modules, with "all-linear" among them or alone, or one regular expression, as for PEFT;
            None for "all-linear", or with ``target_parameters`` for none.
        target_parameters: names of parameters that are stacks of matrices, such as the fused experts of a layer, or
            their ends, as for PEFT; None for none. Each matrix gets a rank r of its own.
        exclude_modules: names of modules, or one regular expression; None for none.
        rank_pattern, alpha_pattern: ranks and alphas of single layers, as for PEFT.
        use_rslora: scale by alpha/√r instead of alpha/r.
        init: "pissa" or "pissa_niter_N".
        seed: seed of the sketches.
        trust_remote_code: run the Python code that comes with the checkpoint to build its model.
        quantize: "nf4", "fp4" or "int8", the format of the result; None for the dtypes of the source.
        double_quant: quantize the scales of nf4 and fp4 too.
        quant_block: elements that share a scale in nf4 and fp4.
        quant_iterations: alternations of SVD and quantization, or "auto" for as many as gain half a percent each.
        nuclear: measure the nuclear norms of the quantization errors for the report, by full SVDs.
        device: "cpu" or "cuda", where the weights are decomposed.
        workers: weights at a time in this process; None for as many as torch has threads, two on a GPU.
        resume: continue an unfinished run, if there is one.
        force: replace a result of this function that holds no other files, and start an unfinished run again unless
            ``resume``.
        progress: show a bar where stderr is a terminal.
        on_plan: called with the plan before anything is written.
        on_tensor: called with the journal record of each tensor, or matrix of a stack, of this process.

    Returns:
        The report of all layers, in the model's order.

    Raises:
        FileExistsError: ``out`` exists, or with ``force`` holds files that no run has written; a run is unfinished; or
            ``out`` lies in, under or above the source.
        FileNotFoundError, NotADirectoryError: no checkpoint at ``model``.
        ModuleNotFoundError: ``quantize`` without bitsandbytes.
        OSError: reading or writing failed, or a process of torchrun was lost, which the message names. The run can be
            resumed, and the source is unchanged.
        RuntimeError: another process writes to ``out``, or ``device`` is not available.
        TypeError, ValueError: a layer or an option is refused; the message names it, and no unfinished run is left. Or
            the unfinished run had other options or another source.

    Examples:
        >>> import pathlib, tempfile, torch, transformers
        >>> import pissa_kernels as pk
        >>> config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        ...     num_attention_heads=2, vocab_size=64)
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
        >>> report = pk.init_checkpoint(folder / "base", folder / "out", rank=4, target_modules=["q_proj", "v_proj"])
        >>> [(layer.name, layer.rank) for layer in report.layers]
        [('model.layers.0.self_attn.q_proj', 4), ('model.layers.0.self_attn.v_proj', 4)]
        >>> pk.verify_checkpoint(folder / "base", folder / "out")
        []
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise RuntimeError(f"device={device!r}: this torch sees no CUDA device")
    parameters = entries("target_parameters", target_parameters)
    options = AdapterOptions(
        rank=rank,
        alpha=alpha,
        init=init,
        seed=seed,
        target_modules=entries("target_modules", target_modules, default_modules(parameters)),
        target_parameters=parameters,
        exclude_modules=entries("exclude_modules", exclude_modules),
        rank_pattern={} if rank_pattern is None else rank_pattern,
        alpha_pattern={} if alpha_pattern is None else alpha_pattern,
        use_rslora=use_rslora,
        trust_remote_code=trust_remote_code,
    )
    quantization = quantization_options(quantize, double_quant, quant_block, quant_iterations, nuclear)
    job = plan_checkpoint(Path(model), Path(out), options, device, quantization)
    if on_plan is not None:
        on_plan(job)
    return run_job(job, workers=workers, resume=resume, force=force, on_tensor=on_tensor, progress=progress)


def run_job(
    job: CheckpointJob,
    *,
    workers: int | None = None,
    resume: bool = False,
    force: bool = False,
    on_tensor: Callable[[Record], None] | None = None,
    progress: bool = True,
) -> CheckpointReport:
    """Carry out a plan. The arguments, errors and result are those of :func:`init_checkpoint`."""
    try:
        with joined() as group, contextlib.ExitStack() as lock:
            return _run_together(job, group, lock, workers, resume, force, on_tensor, progress)
    except ProcessLost as error:
        error.args = (f"{error}; finished tensors are kept, and --resume continues with any number of processes",)
        raise


def _run_together(
    job: CheckpointJob,
    group: ProcessGroup,
    lock: contextlib.ExitStack,
    workers: int | None,
    resume: bool,
    force: bool,
    on_tensor: Callable[[Record], None] | None,
    progress: bool,
) -> CheckpointReport:
    journal = Journal(job.out)
    hosts = group.hosts() if group.world > 1 else []
    finished, run = False, None
    with group.together():
        if group.first:
            lock.enter_context(journal.locked())
            finished, run = _begin(job, journal, resume, force, hosts)
    finished, run = group.gather((finished, run))[0]
    if finished:
        return checkpoint_report(job, kept=len(job.tensors))
    journal.join_run(run, group.check)
    began, peak = time.perf_counter(), Peak()
    refusal: TypeError | ValueError | None = None
    kept = 0
    with group.together(), peak:
        try:
            kept = work(job, journal, group, workers, on_tensor, progress)
        except (TypeError, ValueError) as error:
            if not hasattr(error, "layer"):  # not of a weight, but of ``on_tensor``, for example
                raise
            refusal = error
    if any(group.gather(refusal is not None)):
        with group.together():
            _discard(job, journal if group.first else None, refusal)
    kept = sum(group.gather(kept))
    with group.together():
        if group.first:
            records = collect_records(job, journal)
            # the time of an earlier run is not known
            seconds = time.perf_counter() - began if not kept else None
            publish(job, journal, records, seconds, peak.extra_bytes, replace=force)
    return checkpoint_report(job, kept)


def _discard(job: CheckpointJob, journal: Journal | None, refusal: TypeError | ValueError | None) -> None:
    """Delete the unfinished run after a weight was refused: the same plan is refused again, and no other resumes it."""
    if journal is not None:
        journal.fence()
        journal.discard()
    if refusal is not None:
        layer = getattr(refusal, "layer", "")
        of_stack = any(f"{stack.name}[" in layer for stack in job.stacks)
        out = "out of --target-parameters" if of_stack else "out with --exclude-modules"
        advice = "repair the weight" + ("" if job.quantization else f", or leave the layer {out}")
        refusal.args = (f"{refusal}; the unfinished result is deleted: {advice}",)
        raise refusal


def _begin(
    job: CheckpointJob, journal: Journal, resume: bool, force: bool, hosts: list[str]
) -> tuple[bool, str | None]:
    """Create the folder of the run, or check that it can be resumed.

    Returns:
        Whether the result is complete already, and what the other processes need to join the run.
    """
    journal.check_folder()
    placement, unfinished = journal.placement, journal.exists()
    if unfinished and not (resume or force):
        raise FileExistsError(f"{job.out} has an unfinished run; --resume continues it, --force starts again")
    if unfinished and resume:
        journal.check(job)
        run = journal.begin_run(hosts)
        if journal.finish(job):
            return True, None
        placement.check(force or journal.replaces())
        journal.lay_out(job)  # no journal says whether the headers were flushed to the disk
        return False, run
    if unfinished:
        placement.recover()
    if resume and not force and is_result_of(job.out, job.record()):
        return True, None
    placement.check(force)
    journal.begin(job, replace=force)
    return False, journal.begin_run(hosts)
