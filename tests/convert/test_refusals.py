"""Adapters that are refused, with one line that names the cause."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa_kernels.convert.convert import convert_adapter

from ..support.adapted import lora_layers
from .adapters import make, retensor, rewrite

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def spoil_trained(change: Any) -> Any:
    return lambda folder: retensor(folder / "trained" / "adapter_model.safetensors", change)


def spoil_config(**changes: Any) -> Any:
    return lambda folder: rewrite(folder / "trained", **changes)


def cut(name: str) -> Any:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


REFUSALS: dict[str, tuple[Any, str]] = {
    "no trained": (lambda f: shutil.rmtree(f / "trained"), r"trained is not an adapter folder: it has no adapter_con"),
    "no initial": (lambda f: shutil.rmtree(f / "residual"), r"residual has no initial adapter; accepted are"),
    "no weights": (lambda f: (f / "trained/adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
    "cut weights": (cut("trained/adapter_model.safetensors"), r"trained/adapter_model\.safetensors is damaged"),
    "cut initial": (cut("residual/pissa_init/adapter_model.safetensors"), r"pissa_init/adapter_model\S+ is damaged"),
    "cut config": (cut("trained/adapter_config.json"), r"trained/adapter_config\.json is damaged"),
    "other type": (
        spoil_config(peft_type="IA3"), r"not the config of a LoRA: its peft_type is 'IA3', accepted is 'LORA'"
    ),
    "bad parameters": (spoil_config(target_parameters="x"), r"has the target_parameters 'x'; accepted is a list of"),
    "bad rank": (spoil_config(r="4"), r"has the ranks \['4'\]; accepted are integers ≥ 1"),
    "bad alpha": (spoil_config(alpha_pattern={"q": None}), r"has the alphas \[4, None\]; accepted are numbers"),
    "no number": (spoil_config(alpha_pattern={"q": math.nan}), r"adapter_config\.json is damaged: not JSON: NaN is"),
    "infinite alpha": (spoil_config(lora_alpha=10**40), r"has the alphas \[10{40}\]; accepted are numbers"),
    "bad base": (spoil_config(base_model_name_or_path=3), r"has the base_model_name_or_path 3; accepted is a string"),
    "bad targets": (
        spoil_config(target_modules=["q_proj", []]), r"has the target_modules \['q_proj', \[\]\]; accepted is"
    ),
    "bad pattern": (spoil_config(rank_pattern=[1]), r"has the rank_pattern \[1\]; accepted is an object"),
    "bad regex": (spoil_config(rank_pattern={"(": 1}), r"the pattern '\(' is not a regular expression"),
    "config of another rank": (
        spoil_config(r=5), r"layer 'model\S+' in \S+: lora_A has shape \(4, \d+\); accepted is \(5, in\)"
    ),
    "scaling": (spoil_config(lora_alpha=5), r"layer 'model\S+': scaling 1.25 in \S+, but 1.0 in \S+; accepted is"),
    "shape": (
        spoil_trained(lambda t: t.update({Q + ".lora_A.weight": torch.ones(4, 5)})),
        r"layer 'model\.layers\.0\.self_attn\.q_proj': shape \(64, 5\) in \S+, but \(64, 64\) in",
    ),
    "layer less": (
        spoil_trained(lambda t: [t.pop(f"{Q}.lora_{factor}.weight") for factor in "AB"]),
        r"layer 'model\S+0\.self_attn\.q_proj' is in \S+pissa_init\S+ but not in \S+trained\S+ \(1 such layers\)",
    ),
    "keys without PEFT's prefix": (
        spoil_trained(
            lambda t: [t.update({key.removeprefix("base_model.model."): t.pop(key)}) for key in list(t)]
        ),
        r"PEFT saves no factor under the key 'model\.layers\S+; save the adapter with PEFT",
    ),
    "half": (spoil_trained(lambda t: t.pop(Q + ".lora_B.weight")), r"layer 'model\S+q_proj' in \S+: lora_B is missing"),
    "none": (
        spoil_trained(lambda t: [t.pop(key) for key in list(t)] and t.update(x=torch.ones(1))),
        r"has no LoRA factors",
    ),
    "dtype": (
        spoil_trained(lambda t: t.update({Q + ".lora_A.weight": torch.ones(4, 64, dtype=torch.int8)})),
        r"layer 'model\S+q_proj' in \S+: lora_A has dtype I8; accepted are F64, F32, F16, BF16",
    ),
    "keys": (
        spoil_trained(lambda t: t.update({Q + ".lora_A.default.weight": torch.ones(4, 64)})),
        r"PEFT saves no factor under the key \S+q_proj\.lora_A\.default\.weight'",
    ),
    "nan": (
        spoil_trained(lambda t: t[Q + ".lora_A.weight"][0, 0].fill_(math.nan)),
        r"layer 'model\.layers\.0\.self_attn\.q_proj': a factor has NaN or Inf in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_names_the_cause_and_writes_nothing(refusal: str, copied: Path) -> None:
    spoil, words = REFUSALS[refusal]
    spoil(copied)
    before = sorted(copied.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        convert_adapter(copied / "trained", copied / "residual", copied / "lora")
    assert "\n" not in str(caught.value)
    assert sorted(copied.rglob("*")) == before


def test_initial_adapter_of_another_rank(copied: Path) -> None:
    _, other = make(copied / "other", r=2, lora_alpha=2)
    assert lora_layers(other)
    with pytest.raises(ValueError, match=r"layer \S+: rank 4 in \S+trained\S+, but 2 in \S+pissa_init"):
        convert_adapter(copied / "trained", copied / "other" / "residual", copied / "lora")


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_rank_out_of_range(rank: int, copied: Path) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is out of range; accepted is 1 to 8"):
        convert_adapter(copied / "trained", copied / "residual", copied / "lora", rank=rank)
    assert not (copied / "lora").exists()


def test_damaged_sidecar(copied: Path) -> None:
    path = copied / "trained" / "pissa_initial.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its contents do not match the hash"):
        convert_adapter(copied / "trained", copied / "trained", copied / "lora")
    retensor(path, lambda tensors: None)  # this drops the report
    with pytest.raises(ValueError, match="does not hold the initial factors of a PiSSA adapter"):
        convert_adapter(copied / "trained", copied / "trained", copied / "lora")


@pytest.mark.parametrize(
    "base",
    [
        "/typo",
        "./typo",
        "../typo",
        "~/typo",
        "a/b/c",
        "models/llama",
        "C:\\models\\llama",
        "C:/models/llama",
        "models/",
    ],
)
def test_a_base_model_that_is_a_path_has_to_exist(
    base: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    if base == "models/":
        (tmp_path / "models").rmdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^the base model {re.escape(base)} does not exist"):
        convert_adapter(copied / "trained", copied / "trained", tmp_path / "lora", base=base)
    assert not (tmp_path / "lora").exists()


def test_a_base_model_that_may_be_on_a_hub_is_noted(copied: Path, tmp_path: Path) -> None:
    for index, base in enumerate(["someone/model", "gpt2"]):
        done = convert_adapter(copied / "trained", copied / "trained", tmp_path / f"{index}", base=base)
        assert f"not compared with the base model, because {base} is not a folder" in done.notes
