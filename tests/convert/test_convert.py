"""Conversion to a plain LoRA, with which the original model computes what the trained model does."""

from __future__ import annotations

import copy
import doctest
import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pissa_kernels as pk
from pissa_kernels.cli import main as cli
from pissa_kernels.convert import plain
from pissa_kernels.convert.convert import convert_adapter
from pissa_kernels.convert.pair import AdapterPair
from pissa_kernels.convert.report import ConversionReport
from pissa_kernels.files import header

from ..peft.test_models import config, lora_layers, moved
from ..peft.test_save import allowed, train
from ..support.models import build, output

DTYPES = [torch.float32, torch.bfloat16]
Weights = dict[str, torch.Tensor]


def make(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """Returns the original and the trained model, saved in ``folder`` as base, residual (with pissa_init), trained."""
    base = build(name, dtype, width=64)
    with pk.patch_peft():
        adapted = peft.get_peft_model(copy.deepcopy(base), config(name, **changes)).eval()
    pk.save_pissa(adapted, folder / "residual")
    train(adapted)
    for key, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in key and "lora_B" not in key:
            parameter.data *= 1.1
    adapted.save_pretrained(folder / "trained")
    base.save_pretrained(folder / "base")
    return base, adapted


def loaded(base: Any, folder: Path) -> Any:
    """The original model with the converted adapter, loaded by PEFT alone."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("llama")
    base, adapted = make(folder)
    return folder, base, adapted


@pytest.fixture
def copied(llama: tuple[Path, Any, Any], tmp_path: Path) -> Path:
    """A copy of the same folders, for tests that change them."""
    return Path(shutil.copytree(llama[0], tmp_path / "copied"))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change a config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(path: Path, change: Any) -> None:
    """Change the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# The converted adapter


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_the_original_model_with_the_lora_is_the_trained_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapted = make(tmp_path, name, dtype)
    trained = output(adapted)
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")
    model = loaded(base, tmp_path / "lora")
    assert moved(output(base), trained) > 3 * allowed(dtype)
    assert moved(trained, output(model)) <= allowed(dtype)
    assert {layer.name: layer.rank for layer in done.layers} == dict.fromkeys(lora_layers(adapted), 8)
    assert done.loss == 0
    assert done.checked is not None
    assert 0.1 < done.checked <= 1
    assert model.peft_config["default"].init_lora_weights is True
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert not done.notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "residual", "trained"]


PATTERNS = {"rank_pattern": {"q_proj": 6, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"layers.0.*_proj": 10}}
SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "patterns": PATTERNS,
    "rslora and patterns": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True},
    "modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("rank", [None, 3, 12])
@pytest.mark.parametrize("setting", SETTINGS)
def test_scalings_and_other_tensors_are_kept(setting: str, rank: int | None, tmp_path: Path) -> None:
    """Rank 12 is twice the highest rank of the patterns, at which the conversion is exact."""
    if rank == 12 and "patterns" not in setting:
        rank = 8
    base, adapted = make(tmp_path, **SETTINGS[setting])
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual/pissa_init", tmp_path / "lora", rank=rank)
    model = loaded(base, tmp_path / "lora")
    before, after = lora_layers(adapted), lora_layers(model)
    for name, layer in before.items():
        full = 2 * layer.r["default"]
        assert after[name].r["default"] == (full if rank is None else min(rank, full))
        assert math.isclose(after[name].scaling["default"], layer.scaling["default"], rel_tol=1e-15)
    if rank == 3:
        assert 0.1 < done.loss < 0.9
    else:
        assert done.loss <= 1e-12
        assert moved(output(adapted), output(model)) <= allowed(torch.float32)
    weights, trained = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "trained"))
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[key], trained[key]) for key in done.carried)
    assert len(done.carried) == {"dora": len(before), "modules": 2}.get(setting, 0)


def test_a_trained_classifier_is_copied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, num_labels=3
    )
    base = transformers.BertForSequenceClassification(small).eval()
    with pk.patch_peft():
        adapted = peft.get_peft_model(copy.deepcopy(base), config("bert", task_type="SEQ_CLS")).eval()
    adapted.save_pretrained(tmp_path / "initial")
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "trained")
    done = convert_adapter(tmp_path / "trained", tmp_path / "initial", tmp_path / "lora")
    assert any("classifier" in key for key in done.carried)
    model = loaded(base, tmp_path / "lora")
    assert moved(output(base), output(adapted)) > 1e-2
    assert moved(output(adapted), output(model)) <= 1e-5


def test_the_sidecar_is_an_initial_adapter(llama: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, adapted = llama
    convert_adapter(folder / "trained", folder / "residual", tmp_path / "one")
    convert_adapter(folder / "trained", folder / "trained", tmp_path / "other")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
    assert moved(output(adapted), output(loaded(base, tmp_path / "other"))) <= allowed(torch.float32)


def test_a_bf16_adapter_is_exact_in_bf16(llama: tuple[Path, Any, Any], copied: Path) -> None:
    def narrow(tensors: Weights) -> None:
        tensors.update({key: value.bfloat16() for key, value in tensors.items()})

    for name in ("trained", "residual/pissa_init"):
        retensor(copied / name / "adapter_model.safetensors", narrow)
    convert_adapter(copied / "trained", copied / "residual", copied / "lora")
    trained, weights = (load_file(copied / name / "adapter_model.safetensors") for name in ("trained", "lora"))
    for key, value in trained.items():
        assert weights[key].dtype == torch.bfloat16
        half = weights[key][:4] if "lora_A" in key else weights[key][:, :4]
        assert torch.equal(half, value)
    convert_adapter(copied / "trained", copied / "residual", copied / "narrow", rank=2)
    assert {value.dtype for value in load_file(copied / "narrow/adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("rank", [None, 3, 8])
def test_an_untrained_adapter_changes_nothing(rank: int | None, llama: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, _ = llama
    initial = folder / "residual" / "pissa_init"
    done = convert_adapter(initial, initial, tmp_path / "lora", rank=rank, base="someone/model")
    assert done.loss == 0
    assert {layer.loss for layer in done.layers} == {0}
    assert done.notes[-1].endswith("pissa_init equals its initial adapter, so the result changes nothing")
    assert moved(output(base), output(loaded(base, tmp_path / "lora"))) <= allowed(torch.float32)


# The base model


def test_the_manifest_of_a_residual_checkpoint_names_the_original(tmp_path: Path) -> None:
    base = build("llama", width=64, layers=1)
    base.save_pretrained(tmp_path / "base")
    assert cli.main(["init", str(tmp_path / "base"), str(tmp_path / "residual"), "--rank", "2", "--json"]) == 0
    initial = tmp_path / "residual" / "pissa_init"
    done = convert_adapter(initial, tmp_path / "residual", tmp_path / "lora")
    assert Path(done.base or "").resolve() == (tmp_path / "base").resolve()
    done = convert_adapter(initial, initial, tmp_path / "lora", base=tmp_path / "base", force=True)
    assert done.checked is not None
    assert done.checked <= 1
    manifest = tmp_path / "residual" / "pissa_manifest.json"
    manifest.write_text(manifest.read_text().replace("base", "other"))
    with pytest.raises(ValueError, match=r"pissa_manifest\.json is damaged"):
        convert_adapter(initial, initial, tmp_path / "again")


def test_the_residual_model_is_not_named_as_the_base(copied: Path) -> None:
    def name() -> str | None:
        done = convert_adapter(copied / "trained", copied / "residual", copied / "lora", force=True)
        written = json.loads((copied / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert written == done.base
        assert (written is None) == any("names no base model" in note for note in done.notes)
        return done.base

    rewrite(copied / "trained", base_model_name_or_path="someone/model")
    assert name() == "someone/model"
    rewrite(copied / "trained", base_model_name_or_path=str(copied / "base"))
    assert name() == str(copied / "base")
    rewrite(copied / "trained", base_model_name_or_path=str(copied / "residual"))
    assert name() is None
    rewrite(copied / "trained", base_model_name_or_path=None)
    assert name() is None


@pytest.mark.parametrize("prefix", [("model.", ""), ("", "wrapped.")])
def test_tensor_names_with_and_without_a_prefix(prefix: tuple[str, str], copied: Path) -> None:
    def rename(tensors: Weights) -> None:
        for key in list(tensors):
            tensors[prefix[1] + key.removeprefix(prefix[0])] = tensors.pop(key)

    retensor(copied / "base" / "model.safetensors", rename)
    done = convert_adapter(copied / "trained", copied / "residual", copied / "lora", base=copied / "base")
    assert done.checked is not None
    assert done.checked <= 1


def test_another_base_model_is_refused(copied: Path) -> None:
    key = "model.layers.1.self_attn.q_proj.weight"

    def nudge(tensors: Weights) -> None:
        tensors[key][5, 7] += 1e-4

    retensor(copied / "base" / "model.safetensors", nudge)
    arguments = (copied / "trained", copied / "residual", copied / "lora")
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1\.self_attn\.q_proj': .* times the rounding bound"):
        convert_adapter(*arguments, base=copied / "base")
    with pytest.raises(ValueError, match="times the rounding bound"):
        convert_adapter(*arguments, base=copied / "residual")
    retensor(copied / "base" / "model.safetensors", lambda tensors: tensors.pop(key))
    with pytest.raises(
        ValueError, match=r"q_proj': \S+/base has 0 tensors that could be 'model\.layers\.1\.self_attn\.q_proj"
    ):
        convert_adapter(*arguments, base=copied / "base")
    retensor(copied / "base" / "model.safetensors", lambda tensors: tensors.update({key: torch.zeros(4, 5)}))
    with pytest.raises(ValueError, match=r"has shape \(4, 5\); accepted is \(64, 64\)"):
        convert_adapter(*arguments, base=copied / "base")
    assert sorted(path.name for path in copied.iterdir()) == ["base", "residual", "trained"]


def test_a_note_says_why_the_models_were_not_compared(copied: Path) -> None:
    arguments = (copied / "trained", copied / "trained", copied / "lora")
    done = convert_adapter(*arguments, base="someone/model")
    assert done.checked is None
    assert done.notes == ["not compared with the base model, because someone/model is not a folder"]
    done = convert_adapter(*arguments, base=copied / "base", force=True)
    assert done.checked is None
    assert done.notes[0].endswith("trained is not in a residual checkpoint")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert_adapter(copied / "trained", copied / "residual", copied / "new", base=copied / "nowhere")


# Files


def test_the_same_files_give_the_same_bytes(llama: tuple[Path, Any, Any], copied: Path) -> None:
    rewrite(copied / "trained", target_modules=sorted(config("llama").target_modules, reverse=True))
    results = []
    for folder, out in ((llama[0], "one"), (llama[0], "two"), (copied, "three")):
        convert_adapter(folder / "trained", llama[0] / "residual", copied / out, rank=3)
        results.append({path.name: path.read_bytes() for path in (copied / out).iterdir()})
    assert results[0].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert results[0] == results[1]
    assert results[0]["adapter_model.safetensors"] == results[2]["adapter_model.safetensors"]
    targets = [json.loads(result["adapter_config.json"])["target_modules"] for result in results]
    assert targets[0] == targets[2] == sorted(targets[0])


@pytest.mark.parametrize("rank", [None, 3])
def test_one_layer_is_in_memory_at_a_time(
    rank: int | None, llama: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    read = AdapterPair.read

    def counted(self: AdapterPair, name: str) -> Any:
        assert not any(reference() for reference in alive)
        factors = read(self, name)
        alive.append(weakref.ref(factors))
        return factors

    monkeypatch.setattr(AdapterPair, "read", counted)
    folder = llama[0]
    convert_adapter(folder / "trained", folder / "residual", tmp_path / "lora", rank=rank, base=folder / "base")
    assert len(alive) == 2 * 14


def test_a_failed_write_leaves_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(copied.rglob("*"))
    written = 0

    def fail(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 5:
            raise OSError("No space left on device")
        header.write_at(*arguments)

    monkeypatch.setattr(plain, "write_at", fail)
    with pytest.raises(OSError, match="No space"):
        convert_adapter(copied / "trained", copied / "residual", copied / "lora")
    assert sorted(copied.rglob("*")) == before


def test_only_force_replaces_an_adapter_and_nothing_else(copied: Path) -> None:
    trained, initial, out = copied / "trained", copied / "residual", copied / "lora"
    out.mkdir()
    convert_adapter(trained, initial, out)
    with pytest.raises(FileExistsError, match="lora exists and is not an empty folder"):
        convert_adapter(trained, initial, out)
    assert convert_adapter(trained, initial, out, rank=1, force=True).layers[0].rank == 1
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 1
    (out / "more").mkdir()
    with pytest.raises(FileExistsError, match="is not just an adapter, and force replaces nothing else"):
        convert_adapter(trained, initial, out, force=True)
    (copied / "file").touch()
    with pytest.raises(FileExistsError, match="is not a folder"):
        convert_adapter(trained, initial, copied / "file", force=True)
    assert sorted(path.name for path in copied.iterdir()) == ["base", "file", "lora", "residual", "trained"]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("place", ["{}", "{}/new", "{}/new/lora", "link/to/{}", "link/to/{}/new"])
@pytest.mark.parametrize("source", ["trained", "residual", "base"])
def test_a_folder_that_is_read_is_not_written_to(source: str, place: str, copied: Path) -> None:
    (copied / "link").mkdir()
    (copied / "link" / "to").symlink_to(copied)
    before = contents(copied)
    with pytest.raises(FileExistsError, match=r"which is read(; choose another folder| and must not be written to)$"):
        convert_adapter(
            copied / "trained", copied / "residual", copied / place.format(source), base=copied / "base", force=True
        )
    assert contents(copied) == before


def test_a_folder_above_one_that_is_read_is_not_replaced(copied: Path) -> None:
    before = contents(copied)
    for out in (copied, copied.parent, copied / "residual"):
        with pytest.raises(FileExistsError, match="which is read; choose another folder"):
            convert_adapter(copied / "trained", copied / "residual" / "pissa_init", out, force=True)
    assert contents(copied) == before


def test_the_same_folder_under_another_name_is_not_written_to(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bind mount: paths that resolve to different names, and have one inode."""
    (copied / "mounted").mkdir()
    before, samefile = contents(copied), Path.samefile
    names = {str(copied / "mounted"): copied / "trained"}

    def bound(self: Path, other: Path) -> bool:
        return samefile(names.get(str(self), self), names.get(str(other), other))

    monkeypatch.setattr(Path, "samefile", bound)
    with pytest.raises(FileExistsError, match="which is read"):
        convert_adapter(copied / "trained", copied / "residual", copied / "mounted", force=True)
    with pytest.raises(FileExistsError, match="which is read"):
        convert_adapter(copied / "trained", copied / "residual", copied / "mounted" / "new")
    assert contents(copied) == before


# Refusals

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
    "experts": (
        spoil_config(target_parameters=["x"]), r"sets target_parameters, so the adapter is more than two factors per layer"
    ),
    "bad rank": (spoil_config(r="4"), r"has the ranks \['4'\]; accepted are integers ≥ 1"),
    "bad alpha": (spoil_config(alpha_pattern={"q": None}), r"has the alphas \[4, None\]; accepted are numbers"),
    "bad pattern": (spoil_config(rank_pattern=[1]), r"has the rank_pattern \[1\]; accepted is an object"),
    "bad regex": (spoil_config(rank_pattern={"(": 1}), r"the pattern '\(' is no(t a)? regular expression"),
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


# The report, the command, the example


def test_the_report(copied: Path) -> None:
    done = convert_adapter(copied / "trained", copied / "residual", copied / "lora", rank=3, base=copied / "base")
    assert isinstance(done, ConversionReport)
    assert isinstance(done, pk.Report)
    assert repr(done) == f"<ConversionReport: {done.summary()}>"
    assert done.summary().startswith(f"{copied}/lora: a plain LoRA of {copied}/base, 14 layers, rank 3, loss ")
    assert done.summary() in done.table().splitlines()
    record = done.to_dict()
    assert list(record) == ["out", "base", "layers", "loss", "carried", "checked", "notes"]
    assert [list(layer) for layer in record["layers"]] == [["name", "shape", "rank", "scaling", "loss"]] * 14
    done.write(copied / "report.json")
    assert json.loads((copied / "report.json").read_text()) == json.loads(done.to_json()) == record
    with pytest.raises(TypeError, match=r"a conversion report cannot be read back"):
        ConversionReport.read(copied / "report.json")
    with pytest.raises(TypeError, match=r"a conversion report cannot be read back"):
        ConversionReport.from_dict(record)
    with pytest.raises(ValueError, match=r"report\.json is not a report"):
        pk.Report.read(copied / "report.json")


def test_the_table_ends_with_notes_and_copied_tensors(tmp_path: Path) -> None:
    make(tmp_path, use_dora=True, **PATTERNS)
    done = convert_adapter(tmp_path / "residual/pissa_init", tmp_path / "residual", tmp_path / "lora")
    *_, summary, copied, first, second = done.table().splitlines()
    assert "a plain LoRA of a model that is not named, 14 layers, rank 4 to 12, loss 0.00e+00" in summary
    assert copied == "14 other tensors were copied"
    assert [first, second] == [f"note: {note}" for note in done.notes]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_the_docstring_example() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(convert_adapter, "convert_adapter", globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_command_line(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", *(str(copied / name) for name in ("trained", "residual", "lora"))]
    base = ["--base", str(copied / "base")]
    assert cli.main([*arguments, "--rank", "3", *base]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    assert lines[0].split() == ["layer", "rank", "loss"]
    assert lines[2].startswith("model.layers.0.mlp.down_proj")
    assert f"{copied}/lora: a plain LoRA of {copied}/base, 14 layers, rank 3, loss " in told.out
    assert "within 0." in told.out
    assert cli.main([*arguments, *base, "--force", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["loss"] == 0
    assert record["base"] == str(copied / "base")
    assert record["layers"][0] == {
        "name": "model.layers.0.mlp.down_proj", "shape": [64, 192], "rank": 8, "scaling": 1.0, "loss": 0.0,
    }  # fmt: skip
    for more, code, words in (
        ([], 2, "exists and is not an empty folder"),
        (["--rank", "9", "--force"], 1, "rank 9 is out of range; accepted is 1 to 8"),
        (["--base", str(copied / "residual"), "--force"], 1, "times the rounding bound"),
    ):
        assert cli.main([*arguments, *more]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
