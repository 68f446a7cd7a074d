"""PiSSA in plain PEFT, from ``get_peft_model`` to a merged model: python -m pissa_kernels.examples.plain

A sentence encoder learns that a docstring's first paragraph and the rest of it belong together. Each line that is
printed says by how much the encoder's embeddings differ, relatively, from those of the model that they should equal.
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
from pissa_kernels.examples.demo import demo_model

from . import count, new_folder, quiet
from .docstrings import docstrings

RANK, LEARNING_RATE, TEMPERATURE, BATCH, BATCHES, TOKENS = 8, 3e-4, 0.05, 16, 4, 32


@dataclass
class Result:
    """What was measured; differences are ‖y' − y‖_F/‖y‖_F of the embeddings y of a batch.

    Attributes:
        loss_before, loss_after: of one batch, before the training and after it.
        injected: the untrained PiSSA model, from the base model.
        trained: the trained model, from the base model.
        reloaded, converted, merged: from the trained model.
        residual: the saved residual model with its initial adapter, loaded by stock PEFT, from the base model.
        original: the trained model under ``original_model``, from the base model.
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


def run(steps: int, out: Path) -> Result:
    """Everything, with files in ``out``."""
    base = transformers.AutoModel.from_pretrained(demo_model()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model())
    pairs = [text.split("\n\n", 1) for text in docstrings("torch", BATCHES * BATCH)]

    def tokens(texts: Sequence[str]) -> Any:
        return tokenizer(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")

    def embed(model: Any, batch: Any) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(2)
        return torch.nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1), dim=1)

    def objective(model: Any, step: int) -> Tensor:
        start = step % BATCHES * BATCH
        summaries, bodies = zip(*pairs[start : start + BATCH], strict=True)
        similarity = embed(model, tokens(summaries)) @ embed(model, tokens(bodies)).T
        return torch.nn.functional.cross_entropy(similarity / TEMPERATURE, torch.arange(len(similarity)))

    probe = tokens([summary for summary, _ in pairs[:BATCH]])

    @torch.no_grad()
    def apart(model: Any, other: Any) -> float:
        expected = embed(other, probe)
        return float((embed(model, probe) - expected).norm() / expected.norm())

    measured: dict[str, float] = {}

    def show(name: str, what: str, difference: float, whose: str) -> None:
        measured[name] = difference
        print(f"{what:31} {difference:.1e} from {whose}")

    # 1. The adapter. The hook is all that PiSSA needs; everything else is PEFT as it is.
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="pissa", target_modules="all-linear")
    with pk.patch_peft() as report:
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    print(f"{report.table()}\n")
    show("injected", "the adapter in place", apart(model, base), "the base model")

    # 2. Training: each summary's own body against the other ones of its batch.
    loss_before = objective(model, 0).item()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), LEARNING_RATE)
    for step in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(objective(model, step))
        optimizer.step()
    loss_after = objective(model, 0).item()
    losses = f"loss {loss_before:.3f} before, {loss_after:.3f} now"
    show("trained", f"trained for {steps} steps", apart(model, base), f"the base model; {losses}")

    # 3. Saved and loaded again: the initial factors are in the folder, so the residual is taken without an SVD.
    model.save_pretrained(out / "adapter")
    with pk.patch_peft() as again:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), out / "adapter").eval()
    times = f"{report.seconds or 0:.3f} s with SVDs, {again.seconds or 0:.3f} s without"
    show("reloaded", "saved, loaded under the hook", apart(loaded, model), f"the trained model; {times}")

    # 4. For those who have PEFT only: the residual as a model of its own, and its initial adapter.
    pk.save_pissa(model, out / "residual")
    frozen = transformers.AutoModel.from_pretrained(out / "residual")
    stock = peft.PeftModel.from_pretrained(frozen, out / "residual" / "pissa_init").eval()
    show("residual", "residual and initial adapter", apart(stock, base), "the base model")

    # 5. A plain LoRA of twice the rank, for the base model as everybody has it.
    initial = str(out / "residual" / "pissa_init")
    model.save_pretrained(out / "lora", path_initial_model_for_weight_conversion=initial)
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(base), out / "lora").eval()
    show("converted", "converted to a plain LoRA", apart(lora, model), "the trained model")

    # 6. The model before, for a moment: a reference policy needs no second copy.
    with pk.original_model(model) as before:
        show("original", "original_model", apart(before, base), "the base model")

    # 7. One model with no adapter at all.
    merged = copy.deepcopy(model).merge_and_unload()
    show("merged", "merged", apart(merged, model), "the trained model")
    return Result(loss_before=loss_before, loss_after=loss_after, **measured)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pissa_kernels.examples.plain", description=__doc__)
    parser.add_argument("--steps", type=count, default=8, help="of the optimiser (8)")
    parser.add_argument("--out", type=new_folder, help="folder for what is saved (a temporary one)")
    arguments = parser.parse_args(argv)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        run(arguments.steps, arguments.out or Path(temporary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
