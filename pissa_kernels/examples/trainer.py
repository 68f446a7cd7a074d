"""PiSSA beside plain LoRA in transformers' Trainer: python -m pissa_kernels.examples.trainer [--plot FILE]

A sentence encoder learns which package a docstring is from, the packages' names left out. Both runs have one seed, one
order of the data, one rank and one learning rate; only the adapters begin differently.
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
from pissa_kernels.examples.demo import demo_model

from . import count, new_folder, quiet
from .comparison import Curve, Result, plot, table
from .docstrings import FAMILIES, docstrings

TRAINING, HELD_OUT, TOKENS, BATCH, SEED = 120, 30, 32, 16, 0
NAMES = re.compile(r"\w*(torch|numpy|transformers|hugging|python)\w*|\bnp\b", re.IGNORECASE)


def samples(tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Training and held-out samples, tokenised."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for label, family in enumerate(FAMILIES):
        for index, docstring in enumerate(docstrings(family, TRAINING + HELD_OUT)):
            tokens = tokenizer(NAMES.sub("", docstring), truncation=True, max_length=TOKENS, padding="max_length")
            parts[index >= TRAINING].append({**tokens, "labels": label})
    return parts


def run(steps: int, rank: int, learning_rate: float, out: Path) -> Result:
    """Both trainings and every check, with files in ``out``."""
    transformers.set_seed(SEED)  # of the classifier's head
    base = transformers.AutoModelForSequenceClassification.from_pretrained(demo_model(), num_labels=len(FAMILIES))
    training, held_out = samples(transformers.AutoTokenizer.from_pretrained(demo_model()))
    batches = [
        transformers.default_data_collator(held_out[start : start + BATCH]) for start in range(0, len(held_out), BATCH)
    ]
    labels = torch.cat([batch["labels"] for batch in batches])

    @torch.no_grad()
    def logits(model: Any) -> Tensor:
        model.eval()
        return torch.cat([model(**batch).logits for batch in batches])

    def loss(outputs: Tensor) -> float:
        return torch.nn.functional.cross_entropy(outputs, labels).item()

    def adapter(init: str | bool) -> Any:
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=rank, lora_alpha=rank, init_lora_weights=init, target_modules="all-linear"
        )
        with pk.patch_peft():
            return peft.get_peft_model(copy.deepcopy(base), config)

    def trainer(model: Any, folder: Path) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
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
        made = transformers.Trainer(model, arguments, train_dataset=training)
        made.remove_callback(transformers.PrinterCallback)
        return made

    def train(model: Any, folder: Path) -> tuple[Curve, Tensor]:
        before = loss(logits(model))
        runner = trainer(model, folder)
        runner.train()
        outputs = logits(model)
        losses = {entry["step"]: entry["loss"] for entry in runner.state.log_history if "loss" in entry}
        return Curve(losses, before, loss(outputs), float((outputs.argmax(1) == labels).float().mean())), outputs

    model = adapter("pissa")
    pissa, trained = train(model, out / "pissa")
    lora, _ = train(adapter(True), out / "lora")

    def apart(outputs: Tensor) -> float:
        return float((outputs - trained).norm() / trained.norm())

    # A run that was interrupted: the model is made again under the hook, the Trainer fills in the checkpoint.
    again = adapter("pissa")
    trainer(again, out / "pissa").train(resume_from_checkpoint=str(out / "pissa" / f"checkpoint-{max(1, steps // 2)}"))
    kept = all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())

    last = out / "pissa" / f"checkpoint-{steps}"
    with pk.patch_peft():
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), last)
    pk.save_pissa(model, out / "residual")
    initial = str(out / "residual" / "pissa_init")
    model.save_pretrained(out / "converted", path_initial_model_for_weight_conversion=initial)
    converted = peft.PeftModel.from_pretrained(copy.deepcopy(base), out / "converted")
    return Result(
        base=loss(logits(base)),
        pissa=pissa,
        lora=lora,
        residual_kept=kept,
        resumed=apart(logits(again)),
        reloaded=apart(logits(reloaded)),
        converted=apart(logits(converted)),
        files=sorted(path.name for path in last.iterdir()),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pissa_kernels.examples.trainer", description=__doc__)
    parser.add_argument("--steps", type=count, default=60, help="of each run (60)")
    parser.add_argument("--rank", type=count, default=8, help="of both adapters (8)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of both runs (1e-3), falling to zero")
    parser.add_argument("--out", type=new_folder, help="folder for checkpoints and adapters (a temporary one)")
    parser.add_argument("--plot", type=Path, help="file for both loss curves")
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
