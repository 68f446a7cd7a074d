"""PiSSA beside plain LoRA in transformers' Trainer: python -m pissa_kernels.examples.trainer [--plot FILE]

A sentence encoder learns to classify docstrings by their package, with the packages' names removed. Both runs have the
same seed, order of the data, rank and learning rate; only the initial adapters differ.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import pissa_kernels as pk

from . import count, new_folder, quiet
from .comparison import Curve, Result, plot, table
from .demo import demo_model
from .docstrings import FAMILIES, docstrings
from .measure import relative_difference

TRAINING, HELD_OUT, TOKENS, BATCH, SEED = 120, 30, 32, 16, 0
NAMES = re.compile(r"\w*(torch|numpy|transformers|hugging|python)\w*|\bnp\b", re.IGNORECASE)


class Task:
    """Tokenized docstrings with their packages as labels, for training and held out."""

    def __init__(self) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model())
        self.training: list[Any] = []
        held_out: list[Any] = []
        for label, family in enumerate(FAMILIES):
            for index, docstring in enumerate(docstrings(family, TRAINING + HELD_OUT)):
                tokens = tokenizer(NAMES.sub("", docstring), truncation=True, max_length=TOKENS, padding="max_length")
                (self.training if index < TRAINING else held_out).append({**tokens, "labels": label})
        self.batches = [
            transformers.default_data_collator(held_out[start : start + BATCH])
            for start in range(0, len(held_out), BATCH)
        ]
        self.labels = torch.cat([batch["labels"] for batch in self.batches])

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """Logits of the held-out texts."""
        model.eval()
        return torch.cat([model(**batch).logits for batch in self.batches])

    def loss(self, logits: Tensor) -> float:
        """Cross-entropy of the held-out texts."""
        return torch.nn.functional.cross_entropy(logits, self.labels).item()

    def train(self, model: Any, trainer: Any) -> tuple[Curve, Tensor]:
        """Train. Returns the losses, and the trained model's logits."""
        before = self.loss(self.logits(model))
        trainer.train()
        logits = self.logits(model)
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        accuracy = float((logits.argmax(1) == self.labels).float().mean())
        return Curve(losses, before, self.loss(logits), accuracy), logits


def add_adapter(base: Any, rank: int, init: str | bool) -> Any:
    """A copy of the base model with an adapter."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=rank, init_lora_weights=init, target_modules="all-linear"
    )
    with pk.patch_peft():
        return peft.get_peft_model(copy.deepcopy(base), config)


def make_trainer(model: Any, training: list[Any], steps: int, learning_rate: float, out: Path) -> Any:
    """A Trainer that saves a checkpoint in the middle and at the end."""
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        logging_steps=1,
        save_strategy="steps",
        save_steps=max(1, steps // 2),
        seed=SEED,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=training)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def run(steps: int, rank: int, learning_rate: float, out: Path) -> Result:
    """Train with PiSSA and with LoRA, resume, reload and convert, with files in ``out``."""
    transformers.set_seed(SEED)  # for the classifier's head
    base = transformers.AutoModelForSequenceClassification.from_pretrained(demo_model(), num_labels=len(FAMILIES))
    task = Task()

    def trainer(model: Any, folder: str) -> Any:
        return make_trainer(model, task.training, steps, learning_rate, out / folder)

    model = add_adapter(base, rank, "pissa")
    pissa, trained = task.train(model, trainer(model, "pissa"))
    plain = add_adapter(base, rank, True)
    lora, _ = task.train(plain, trainer(plain, "lora"))

    # An interrupted run: the hook initializes the model again, and the Trainer loads the checkpoint into it.
    resumed = add_adapter(base, rank, "pissa")
    middle = out / "pissa" / f"checkpoint-{max(1, steps // 2)}"
    trainer(resumed, "pissa").train(resume_from_checkpoint=str(middle))
    kept = all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())

    last = out / "pissa" / f"checkpoint-{steps}"
    with pk.patch_peft():
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), last)
    pk.save_pissa(model, out / "residual")
    initial = str(out / "residual" / "pissa_init")
    model.save_pretrained(out / "converted", path_initial_model_for_weight_conversion=initial)
    converted = peft.PeftModel.from_pretrained(copy.deepcopy(base), out / "converted")
    return Result(
        base=task.loss(task.logits(base)),
        pissa=pissa,
        lora=lora,
        residual_kept=kept,
        resumed=relative_difference(trained, task.logits(resumed)),
        reloaded=relative_difference(trained, task.logits(reloaded)),
        converted=relative_difference(trained, task.logits(converted)),
        files=sorted(path.name for path in last.iterdir()),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pissa_kernels.examples.trainer", description=__doc__)
    parser.add_argument("--steps", type=count, default=60, help="steps of each run (default: 60)")
    parser.add_argument("--rank", type=count, default=8, help="rank of both adapters (default: 8)")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=1e-3,
        help="initial learning rate of both runs, decayed to zero (default: 1e-3)",
    )
    parser.add_argument("--out", type=new_folder, help="folder for checkpoints and adapters (default: a temporary one)")
    parser.add_argument("--plot", type=Path, help="file for a plot of both loss curves")
    arguments = parser.parse_args(argv)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        result = run(arguments.steps, arguments.rank, arguments.learning_rate, arguments.out or Path(temporary))
    print(table(result))
    if arguments.plot:
        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
