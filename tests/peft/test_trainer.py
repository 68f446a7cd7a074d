"""transformers' Trainer with a model made under the hook: checkpoints, resuming, loading the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import pissa_kernels as pk

from ..support.adapted import allowed, config, moved, residuals
from ..support.marks import slow_but
from ..support.models import build, output

STEPS = 6


def make(name: str = "llama", **changes: Any) -> Any:
    with pk.patch_peft():
        return peft.get_peft_model(build(name), config(name, **changes))


def trainer(model: Any, folder: Path, **changes: Any) -> Any:
    texts = [torch.randint(0, 100, (12,), generator=torch.Generator().manual_seed(seed)) for seed in range(24)]
    samples = [{"input_ids": ids, "labels": ids} for ids in texts]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **changes,
    )
    return transformers.Trainer(model, arguments, train_dataset=samples, eval_dataset=samples[:8])


def load(folder: Path | str, **options: Any) -> Any:
    with pk.patch_peft():
        return peft.PeftModel.from_pretrained(build("llama"), folder, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model after all steps, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    model = make()
    trainer(model, folder).train()
    return model.eval(), folder


def test_every_checkpoint_has_its_sidecar(trained: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = trained
    for step in (2, 4, 6):
        assert (folder / f"checkpoint-{step}" / "pissa_initial.safetensors").is_file()
    assert torch.equal(output(load(folder / "checkpoint-6").eval()), output(model))
    trainer(model, tmp_path).save_model(str(tmp_path / "saved"))
    assert torch.equal(output(load(tmp_path / "saved").eval()), output(model))


@pytest.mark.parametrize("way", ["get_peft_model", "from_pretrained"])
def test_a_resumed_run_equals_an_uninterrupted_one(way: str, trained: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = trained
    checkpoint = folder / "checkpoint-4"
    again = make() if way == "get_peft_model" else load(checkpoint, is_trainable=True)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(residual, residuals(model)[name]) for name, residual in residuals(again).items())
    assert torch.equal(output(again.eval()), output(model))


def test_the_best_model_is_loaded_from_disk(tmp_path: Path) -> None:
    model = make()
    # the highest loss counts as the best, so that the best model is not the last one
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    runner = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, **best)
    runner.train()
    assert Path(runner.state.best_model_checkpoint).name == "checkpoint-2"
    assert torch.equal(output(load(runner.state.best_model_checkpoint).eval()), output(model.eval()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, trained: tuple[Any, Path], tmp_path: Path) -> None:
    base, model = build("llama"), make()
    kind = {"use_reentrant": reentrant}
    trainer(model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kind).train()
    with pk.original_model(model), torch.no_grad():  # in training mode
        assert moved(output(base), output(model)) <= allowed(torch.float32)
    assert moved(output(trained[0]), output(model.eval())) <= allowed(torch.float32)


EXTRAS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "dora and head": ("llama", {"use_dora": True, "modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"trainable_token_indices": [1, 2]}),
    "biases": ("gpt2", {"bias": "all"}),
    "head and embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("extra", slow_but(EXTRAS, "dora and head"))
def test_after_the_best_model_is_loaded_everything_is_saved_right(extra: str, tmp_path: Path) -> None:
    """The best checkpoint, the initial state and the plain LoRA give the outputs that they should."""
    name, changes = EXTRAS[extra]
    base, model = build(name), make(name, **changes)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    runner = trainer(model, tmp_path / "run", eval_strategy="steps", eval_steps=2, **best)
    runner.train()
    checkpoint = Path(runner.state.best_model_checkpoint)
    assert checkpoint.name == "checkpoint-2"
    expected = output(model.eval())
    assert moved(output(base), expected) > 3 * allowed(torch.float32)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(build(name), checkpoint).eval()
    assert torch.equal(output(loaded), expected)
    pk.save_pissa(model, tmp_path / "out")
    residual = type(base).from_pretrained(tmp_path / "out").eval()
    initial = peft.PeftModel.from_pretrained(residual, tmp_path / "out" / "pissa_init").eval()
    assert moved(output(base), output(initial)) <= allowed(torch.float32)
    pk.convert_adapter(checkpoint, tmp_path / "out", tmp_path / "lora")
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert moved(expected, output(plain)) <= allowed(torch.float32)
