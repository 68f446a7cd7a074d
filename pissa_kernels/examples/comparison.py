"""Results of the Trainer example, as a table and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..report.figures import new_figure
from ..report.tables import text_table


@dataclass
class Curve:
    """One run.

    Attributes:
        losses: training loss of each step.
        before, after: loss on the held-out texts, before and after training.
        accuracy: accuracy on the held-out texts, after training.
    """

    losses: dict[int, float]
    before: float
    after: float
    accuracy: float


@dataclass
class Result:
    """What the example measured; a difference is ‖y' − y‖_F/‖y‖_F, for the logits y of the held-out texts.

    Attributes:
        base: held-out loss of the base model with its untrained head.
        pissa, lora: the two runs.
        residual_kept: whether every weight of the resumed run equals that of the uninterrupted run bit for bit.
        resumed: difference of the run resumed from the middle checkpoint from the uninterrupted run.
        reloaded: difference of the reloaded model from the trained model.
        converted: difference of the base model with the converted LoRA from the trained model.
        files: names of the files in the last checkpoint.
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
    """Losses of both runs, averaged over each eighth of the steps, and results of the checks."""
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
    kept = "the same residual bit for bit" if result.residual_kept else "NOT the same weights"
    return f"""{text_table(["", "PiSSA", "LoRA"], rows)}

held-out loss of the base model   {result.base:.3f}
a checkpoint holds                {", ".join(result.files)}
resumed from the middle           {result.resumed:.1e} from the uninterrupted run's logits, {kept}
loaded under the hook             {result.reloaded:.1e} from the trained model's
converted to LoRA, on the base    {result.converted:.1e} from the trained model's"""


def plot(result: Result, path: Path) -> None:
    """Plot the training losses of both runs."""
    figure = new_figure(6.4, 3.6)
    axes = figure.add_subplot()
    for name, curve, color in (("PiSSA", result.pissa, "#0072B2"), ("LoRA", result.lora, "#D55E00")):
        axes.plot(list(curve.losses), list(curve.losses.values()), label=name, color=color)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
