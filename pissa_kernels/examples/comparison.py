"""What the Trainer example measures, as a table and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pissa_kernels.report.figures import new_figure
from pissa_kernels.report.tables import text_table


@dataclass
class Curve:
    """One run: training losses by step, and on the held-out texts the loss before it, the loss and accuracy after."""

    losses: dict[int, float]
    before: float
    after: float
    accuracy: float


@dataclass
class Result:
    """What was measured; differences are ‖y' − y‖_F/‖y‖_F of the logits y of the held-out texts.

    Attributes:
        base: held-out loss of the base model with its untrained head.
        pissa, lora: the two runs.
        residual_kept: whether every weight of the resumed run is that of the uninterrupted one, to the last bit.
        resumed: the run that went on from the checkpoint half way, from the one that was not interrupted.
        reloaded: from the trained model.
        converted: a plain LoRA on the base model, from the trained model.
        files: in the last checkpoint.
    """

    base: float
    pissa: Curve
    lora: Curve
    residual_kept: bool
    resumed: float
    reloaded: float
    converted: float
    files: list[str]


def table(result: Result) -> str:
    """Losses of both runs, averaged over an eighth of the steps, and what the checks found."""
    steps = sorted(result.pissa.losses)
    width = -(-len(steps) // 8)
    rows = []
    for start in range(0, len(steps), width):
        part = steps[start : start + width]
        means = [sum(curve.losses[step] for step in part) / len(part) for curve in (result.pissa, result.lora)]
        rows.append([f"loss, steps {part[0]} to {part[-1]}", *(f"{mean:.3f}" for mean in means)])
    for name, field in (("held-out loss before", "before"), ("held-out loss after", "after")):
        rows.append([name, *(f"{getattr(curve, field):.3f}" for curve in (result.pissa, result.lora))])
    rows.append(["held-out accuracy after", *(f"{curve.accuracy:.1%}" for curve in (result.pissa, result.lora))])
    kept = "the same residual to the last bit" if result.residual_kept else "NOT the same weights"
    return f"""{text_table(["", "PiSSA", "LoRA"], rows)}

held-out loss of the base model   {result.base:.3f}
a checkpoint holds                {", ".join(result.files)}
resumed from half way             {result.resumed:.1e} from the uninterrupted run's logits, {kept}
loaded under the hook             {result.reloaded:.1e} from the trained model's
converted to LoRA, on the base    {result.converted:.1e} from the trained model's"""


def plot(result: Result, path: Path) -> None:
    """Both training losses over the steps."""
    figure = new_figure(6.4, 3.6)
    axes = figure.add_subplot()
    for name, curve, colour in (("PiSSA", result.pissa, "#0072B2"), ("LoRA", result.lora, "#D55E00")):
        axes.plot(list(curve.losses), list(curve.losses.values()), label=name, color=colour)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
