"""TRL's DPO trainer with a PiSSA adapter: its reference must be the model before the training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import pissa_kernels as pk

from ..support.adapted import allowed, config, moved, train
from ..support.models import build, output

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS = [f"w{index}" for index in range(96)]
# Loss of a policy that equals its reference.
NO_PREFERENCE = math.log(2)


def tokenizer() -> Any:
    """A word is a token: no file is read."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*special, *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def preferences() -> Any:
    def text(start: int, words: int) -> str:
        return " ".join(WORDS[(start + 7 * index) % len(WORDS)] for index in range(words))

    rows = range(8)
    return datasets.Dataset.from_dict(
        {
            "prompt": [text(row, 4) for row in rows],
            "chosen": [" " + text(row + 30, 5) for row in rows],
            "rejected": [" " + text(row + 60, 5) for row in rows],
        }
    )


def trainer(model: Any, folder: Path, peft_config: Any = None, **changes: Any) -> Any:
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to=[],
        **changes,
    )
    return trl.DPOTrainer(
        model, args=arguments, train_dataset=preferences(), processing_class=tokenizer(), peft_config=peft_config
    )


def losses(runner: Any) -> list[float]:
    runner.train()
    return [entry["loss"] for entry in runner.state.log_history if "loss" in entry]


@pytest.mark.parametrize("precompute", [False, True])
def test_a_new_adapter_starts_from_its_reference(precompute: bool, tmp_path: Path) -> None:
    """TRL disables the adapter to get the reference, which is then the model before PiSSA."""
    base = build("llama")
    with pk.patch_peft():
        runner = trainer(copy.deepcopy(base), tmp_path, config("llama"), precompute_ref_log_probs=precompute)
    found = losses(runner)
    assert abs(found[0] - NO_PREFERENCE) <= 1e-4
    assert found[-1] < NO_PREFERENCE - 1e-2
    with runner.model.disable_adapter():
        assert moved(output(base), output(runner.model.eval())) <= allowed(torch.float32)


@pytest.mark.parametrize("block", ["inside", "after"])
def test_a_trained_adapter_is_its_own_reference(block: str, tmp_path: Path) -> None:
    """TRL copies the adapter to a second one, "ref", also after the block has ended."""
    base = build("llama")
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base), config("llama"))
        train(model)
        reference = output(model.eval())
        if block == "inside":
            runner = trainer(model, tmp_path)
    if block == "after":
        runner = trainer(model, tmp_path)
    assert "ref" in model.peft_config
    assert moved(reference, output(model.eval())) <= allowed(torch.float32)
    found = losses(runner)
    assert abs(found[0] - NO_PREFERENCE) <= 1e-4
    assert found[-1] < NO_PREFERENCE - 1e-2
    assert moved(reference, output(model.eval())) > 3 * allowed(torch.float32)
    model.set_adapter("ref")
    assert moved(reference, output(model)) <= allowed(torch.float32)


def test_the_trained_policy_is_saved_and_converted(tmp_path: Path) -> None:
    base = build("llama")
    with pk.patch_peft():
        runner = trainer(copy.deepcopy(base), tmp_path, config("llama"))
    losses(runner)
    expected = output(runner.model.eval())
    runner.save_model(str(tmp_path / "trained"))
    pk.convert_adapter(tmp_path / "trained", tmp_path / "trained", tmp_path / "lora")
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert moved(expected, output(plain)) <= allowed(torch.float32)
