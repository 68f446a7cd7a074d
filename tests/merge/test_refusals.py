"""Merges that are refused, with one line that names the cause."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import pissa_kernels as pk

from ..convert.adapters import retensor, rewrite
from ..support.checkpoints import tied_llama
from ..support.merging import quantize, residual

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as base, its residual, the adapter as trained, and as trained on the original."""
    folder = tmp_path_factory.mktemp("merge") / "folders"
    out = residual(folder, "llama")
    shutil.copytree(out / "pissa_init", folder / "trained")
    for name in ("pissa_report.json", "pissa_report.json.sha256"):
        (folder / "trained" / name).unlink()
    return folder


@pytest.fixture
def folders(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "folders"))


def spoil_trained(change: Any) -> Any:
    return lambda folder: retensor(folder / "trained" / "adapter_model.safetensors", change)


def spoil_config(**changes: Any) -> Any:
    return lambda folder: rewrite(folder / "trained", **changes)


def plain(folder: Path) -> None:
    """As convert marks it."""
    path = folder / "trained" / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "written_by": "pissa-kernels convert"})


def model_config(**changes: Any) -> Any:
    def spoil(folder: Path) -> None:
        path = folder / "residual" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def own_adapter(folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "trained" / name, folder / "residual" / name)


REFUSALS: dict[str, tuple[Any, str]] = {
    "no adapter": (lambda f: shutil.rmtree(f / "trained"), r"trained is not an adapter folder: it has no adapter_conf"),
    "no checkpoint": (lambda f: shutil.rmtree(f / "residual"), r"residual does not exist"),
    "dora": (spoil_config(use_dora=True), r"trained/adapter_config\.json sets use_dora, so the adapter is more than"),
    "lora_bias": (spoil_config(lora_bias=True), r"sets lora_bias, so the adapter is more than s·B·A per layer; merge"),
    "replicated": (spoil_config(layer_replication=[[0, 1], [0, 1]]), r"sets layer_replication"),
    "tokens": (spoil_config(trainable_token_indices=[1]), r"sets trainable_token_indices"),
    "hook": (spoil_config(init_lora_weights="pissa_niter_4"), r"has the init_lora_weights 'pissa_niter_4', with which"),
    "loftq": (spoil_config(init_lora_weights="loftq"), r"has the init_lora_weights 'loftq', with which the"),
    "plain": (plain, r"trained is a plain LoRA of the original model, which convert made, and \S+ holds residuals"),
    "nan": (
        spoil_trained(lambda t: t[Q + ".lora_A.weight"][0, 0].fill_(math.nan)),
        r"layer 'model\.layers\.0\.self_attn\.q_proj': '\S+q_proj\.lora_A\.weight' in \S+ has NaN or Inf; take an ear",
    ),
    "overflow": (
        spoil_trained(lambda t: [t[f"{Q}.lora_{factor}.weight"].fill_(1e30) for factor in "AB"]),
        r"layer 'model\.layers\.0\.self_attn\.q_proj': the result has NaN or Inf in BF16",
    ),
    "another layer": (
        spoil_trained(
            lambda t: [t.update({f"{Q}.x.lora_{c}.weight": t.pop(f"{Q}.lora_{c}.weight")}) for c in "AB"]
        ),
        r"layer '\S+q_proj\.x' of \S+trained: \S+residual has no such tensor; give the checkpoint that the adapter",
    ),
    "another shape": (
        spoil_trained(lambda t: t.update({Q + ".lora_A.weight": torch.ones(4, 32)})),
        r"layer 'model\.\S+q_proj': the factors in \S+trained are for a weight \(64, 32\), and '\S+q_proj\.weight' of "
        r"\S+residual is \(64, 64\); give the checkpoint that the adapter was trained on",
    ),
    "unknown tensor": (
        spoil_trained(lambda t: t.update({"base_model.model.score.weight": torch.ones(3, 64)})),
        r"'base_model\.model\.score\.weight': \S+residual has no such tensor",
    ),
    "resized": (
        spoil_trained(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(101, 64)})),
        r"'base_model\.model\.lm_head\.weight' has shape \(101, 64\), and 'lm_head\.weight' of \S+residual is \(100, ",
    ),
    "gptq": (
        model_config(quantization_config={"quant_method": "gptq"}),
        r"residual is quantized \(gptq\) and has no weights in NF4, FP4 or int8 of bitsandbytes",
    ),
    "adapter of its own": (own_adapter, r"residual holds an adapter of its own \(adapter_config\.json, adapter_model"),
}  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_names_the_cause_and_writes_nothing(refusal: str, folders: Path) -> None:
    spoil, words = REFUSALS[refusal]
    spoil(folders)
    before = sorted(folders.rglob("*"))
    with pytest.raises((FileNotFoundError, TypeError, ValueError), match=words) as caught:
        pk.merge_checkpoint(folders / "residual", folders / "trained", folders / "merged", progress=False)
    assert "\n" not in str(caught.value)
    assert sorted(folders.rglob("*")) == before


def test_the_original_in_the_place_of_the_residual(folders: Path) -> None:
    """The manifest of the model that the adapter's config names knows its source."""
    residual_of = json.loads((folders / "residual" / "pissa_manifest.json").read_text())["source"]
    rewrite(folders / "trained", base_model_name_or_path=str(folders / "residual"))
    with pytest.raises(ValueError, match=r"trained was trained on the residual checkpoint \S+residual, as its config"):
        pk.merge_checkpoint(residual_of, folders / "trained", folders / "merged", progress=False)


def test_another_base_in_the_config_is_noted(folders: Path) -> None:
    for name, notes in ((str(folders / "residual"), 0), ("someone/model", 1), (None, 0)):
        rewrite(folders / "trained", base_model_name_or_path=name)
        done = pk.merge_checkpoint(
            folders / "residual", folders / "trained", folders / "merged", progress=False, force=True
        )
        assert len(done.notes) == notes
        assert all(f"names the base model {name}, and not {folders}/residual" in note for note in done.notes)


def test_float16_is_too_narrow(folders: Path) -> None:
    """For a merged weight, and for one that is copied."""
    for key in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        copied = folders / key
        shutil.copytree(folders / "residual", copied)
        for path in copied.glob("*.safetensors"):
            tensors = load_file(path)
            if key in tensors:
                tensors[key][0, 0] = 1e30
                save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"has NaN or Inf in F16; .*--dtype bfloat16 is wide enough"):
            pk.merge_checkpoint(copied, folders / "trained", folders / "merged", dtype="float16", progress=False)
        pk.merge_checkpoint(copied, folders / "trained", folders / "merged", progress=False, force=True)
        shutil.rmtree(folders / "merged")


def test_dtype_of_another_kind(folders: Path) -> None:
    for dtype in ("int8", torch.float64):
        with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, got"):
            pk.merge_checkpoint(
                folders / "residual",
                folders / "trained",
                folders / "merged",
                dtype=dtype,
            )


@pytest.mark.parametrize("setting", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}])
def test_tied_weights(setting: dict[str, Any], tmp_path: Path) -> None:
    model = tied_llama()
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=2, **setting)).save_pretrained(tmp_path / "trained")
    with pytest.raises(
        ValueError, match=r"the weight is tied to (lm_head|model\.embed_tokens)\.weight, which would ch"
    ):
        pk.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "merged", progress=False)


def test_damaged_quantized_weights(written: Path, tmp_path: Path) -> None:
    """bitsandbytes would read beyond the end of the tensors."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    out = quantize(written / "residual", tmp_path / "out", "nf4")
    key = "model.layers.0.self_attn.q_proj.weight"
    state = f"{key}.quant_state.bitsandbytes__nf4"

    def another_state(text: str, other: str) -> Any:
        return lambda t: torch.tensor(
            list(bytes(t[state].tolist()).replace(text.encode(), other.encode())), dtype=t[state].dtype
        )

    changes: dict[str, tuple[str, Any]] = {
        "KeyError 'weight.quant_map'": (f"{key}.quant_map", None),
        "weight is torch.uint8": (key, lambda t: t[key][:-1].clone()),
        "weight.absmax is torch.uint8": (f"{key}.absmax", lambda t: t[f"{key}.absmax"][:-1].clone()),
        "JSONDecodeError": (state, another_state("{", "(")),
        "not torch.uint8": (state, another_state("64, 64", "64, 65")),
        "blocksize": (state, another_state('"blocksize"', '"blocksise"')),
        "unknown": (state, another_state("bfloat16", "int32")),
    }
    for index, (words, (name, change)) in enumerate(changes.items()):
        copied = Path(shutil.copytree(out, tmp_path / f"{index}"))
        for path in copied.glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                value = change(tensors) if change else None
                del tensors[name]
                save_file(tensors | ({} if value is None else {name: value}), path, metadata={"format": "pt"})
        if change is None:
            index_path = copied / "model.safetensors.index.json"
            record = json.loads(index_path.read_text())
            del record["weight_map"][name]
            index_path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r"the quantized weight of '\S+q_proj' is damaged") as caught:
            pk.merge_checkpoint(copied, written / "trained", tmp_path / "merged", progress=False)
        assert words in str(caught.value)
