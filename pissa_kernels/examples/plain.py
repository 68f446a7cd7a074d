"""PiSSA in plain PEFT, from ``get_peft_model`` to a merged model: python -m pissa_kernels.examples.plain

A sentence encoder is trained so that the embedding of a docstring's first paragraph is close to that of its body. Each
printed line is the relative difference between the encoder's embeddings and those of the model that they should equal.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import pissa_kernels as pk

from . import count, new_folder, quiet
from .demo import demo_model
from .docstrings import docstrings
from .measure import relative_difference

RANK, LEARNING_RATE, TEMPERATURE, BATCH, BATCHES, TOKENS = 8, 3e-4, 0.05, 16, 4, 32


@dataclass
class Result:
    """What the example measured; a difference is ‖y' − y‖_F/‖y‖_F, for the embeddings y of a batch.

    Attributes:
        loss_before, loss_after: loss of one batch, before and after training.
        injected: difference of the untrained PiSSA model from the base model.
        trained: difference of the trained model from the base model.
        reloaded, converted, merged: difference of that model from the trained model.
        residual: difference of the saved residual model with its initial adapter, loaded by stock PEFT, from the base
            model.
        original: difference of the trained model under ``original_model`` from the base model.
    """

    loss_before: float
    loss_after: float
    injected: float
    trained: float
    reloaded: float
    residual: float
    converted: float
    original: float
    merged: float


class Task:
    """Sentence pairs, and a contrastive loss on them."""

    def __init__(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model())
        self.pairs = [text.split("\n\n", 1) for text in docstrings("torch", BATCHES * BATCH)]

    def embed(self, model: Any, texts: Sequence[str]) -> Tensor:
        """Normalized mean of the last hidden states of each text, (texts, hidden size)."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(2)
        return torch.nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1), dim=1)

    def loss(self, model: Any, step: int) -> Tensor:
        """Cross-entropy of each summary's own body against all bodies of the step's batch."""
        start = step % BATCHES * BATCH
        summaries, bodies = zip(*self.pairs[start : start + BATCH], strict=True)
        similarity = self.embed(model, summaries) @ self.embed(model, bodies).T
        return torch.nn.functional.cross_entropy(similarity / TEMPERATURE, torch.arange(len(similarity)))

    @torch.no_grad()
    def difference(self, model: Any, expected: Any) -> float:
        """Relative difference between the embeddings of two models, on one batch of summaries."""
        summaries = [summary for summary, _ in self.pairs[:BATCH]]
        return relative_difference(self.embed(expected, summaries), self.embed(model, summaries))


def run(steps: int, out: Path) -> Result:
    """Train, save, reload, convert and merge, with files in ``out``."""
    task = Task()
    base = transformers.AutoModel.from_pretrained(demo_model()).eval()
    measured: dict[str, float] = {}

    def show(name: str, what: str, difference: float, expected: str) -> None:
        measured[name] = difference
        print(f"{what:31} {difference:.1e} from {expected}")

    # 1. The adapter. Only the hook is not plain PEFT.
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="pissa", target_modules="all-linear")
    with pk.patch_peft() as report:
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    print(f"{report.table()}\n")
    show("injected", "initialized", task.difference(model, base), "the base model")

    # 2. Training.
    loss_before = task.loss(model, 0).item()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), LEARNING_RATE)
    for step in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model, step))
        optimizer.step()
    loss_after = task.loss(model, 0).item()
    losses = f"loss {loss_before:.3f} before, {loss_after:.3f} after"
    show("trained", f"trained for {steps} steps", task.difference(model, base), f"the base model; {losses}")

    # 3. Saving and loading. The folder has the initial factors, so the hook subtracts them without an SVD.
    model.save_pretrained(out / "adapter")
    with pk.patch_peft() as loading:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), out / "adapter").eval()
    times = f"{report.seconds or 0:.3f} s with SVDs, {loading.seconds or 0:.3f} s without"
    show("reloaded", "saved, loaded under the hook", task.difference(loaded, model), f"the trained model; {times}")

    # 4. For users without this package: the residual as a model, and its initial adapter.
    pk.save_pissa(model, out / "residual")
    residual = transformers.AutoModel.from_pretrained(out / "residual")
    stock = peft.PeftModel.from_pretrained(residual, out / "residual" / "pissa_init").eval()
    show("residual", "residual and initial adapter", task.difference(stock, base), "the base model")

    # 5. A plain LoRA of twice the rank, for the original base model.
    initial = str(out / "residual" / "pissa_init")
    model.save_pretrained(out / "lora", path_initial_model_for_weight_conversion=initial)
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(base), out / "lora").eval()
    show("converted", "converted to a plain LoRA", task.difference(lora, model), "the trained model")

    # 6. The original model, as for a reference policy, without a second copy.
    with pk.original_model(model) as original:
        show("original", "original_model", task.difference(original, base), "the base model")

    # 7. The model with the adapter merged into its weights.
    merged = copy.deepcopy(model).merge_and_unload()
    show("merged", "merged", task.difference(merged, model), "the trained model")
    return Result(loss_before=loss_before, loss_after=loss_after, **measured)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pissa_kernels.examples.plain", description=__doc__)
    parser.add_argument("--steps", type=count, default=8, help="steps of the optimizer (default: 8)")
    parser.add_argument("--out", type=new_folder, help="folder for the saved models (default: a temporary one)")
    arguments = parser.parse_args(argv)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        run(arguments.steps, arguments.out or Path(temporary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
