"""Experts in init_checkpoint: plain transformers and PEFT load what the original model computes, from either layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import pissa_kernels as pk
from pissa_kernels.checkpoint import stacks as staging
from pissa_kernels.cli.main import main

from ..support.adapted import allowed, moved
from ..support.checkpoints import ADAPTER, ADDED, contents, header, layers, tensors, untimed
from ..support.experts import BOTH, EXPERTS, moe, saved, stacks
from ..support.models import output
from ..support.reference import ROUNDOFF, energy_deficit

RANK = 4
# Whether the file has the experts as the model has them; always so for gpt_oss.
CASES = [
    ("mixtral", torch.bfloat16, False),
    ("mixtral", torch.float32, True),
    ("qwen3_moe", torch.float32, False),
    ("qwen3_moe", torch.bfloat16, True),
    ("deepseek_v3", torch.bfloat16, False),
    ("deepseek_v3", torch.float32, False),
    ("gpt_oss", torch.float32, True),
    ("gpt_oss", torch.bfloat16, True),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small take longer on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def init(model: Path, out: Path, **options: Any) -> pk.Report:
    settings: dict[str, Any] = {"rank": RANK, "target_parameters": BOTH, "progress": False, "workers": 2}
    return pk.init_checkpoint(model, out, **(settings | options))


def load(out: Path, dtype: torch.dtype, adapter: bool = True) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()
    return peft.PeftModel.from_pretrained(base, out, subfolder="pissa_init").eval() if adapter else base


def deficits(original: Any, out: Path) -> Iterator[tuple[str, float]]:
    """For each expert of each stack of a model: the energy that A's rows miss of what rank r can have, in float64."""
    factors = load_file(out / ADAPTER)
    manifest = json.loads((out / "pissa_manifest.json").read_text())["targets"]
    keys = {about["layer"]: about["key"] for about in manifest.values() if "key" in about}
    for name, stack in stacks(original):
        if name in keys:
            A = factors[f"base_model.model.{keys[name]}.lora_A.weight"]
            transposed = original.config.model_type == "gpt_oss"
            for index, (weight, rows) in enumerate(zip(stack, A.chunk(len(stack)), strict=True)):
                yield f"{name}[{index}]", energy_deficit(weight.mT if transposed else weight, rows)


@dataclass
class Case:
    """One checkpoint and its result.

    Attributes:
        name: architecture.
        model: the original model.
        fused: whether its file has the stacks as the model has them.
        folder, out: the checkpoint and the result.
        report: what init returned.
    """

    name: str
    model: Any
    fused: bool
    folder: Path
    out: Path
    report: pk.Report

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}-{case[2]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, dtype, fused = request.param
    root, model = tmp_path_factory.mktemp(name), moe(name, dtype)
    folder = saved(model, root / "model", fused=fused)
    names = tensors(folder).keys()
    assert any(key.endswith("experts.gate_up_proj") for key in names) == fused
    assert any(".experts.10." in key for key in names) == (not fused)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return Case(name, model, fused, folder, root / "out", init(folder, root / "out"))


def test_output_is_unchanged(case: Case) -> None:
    loaded = load(case.out, case.dtype)
    wide = transformers.AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    # in float32, as a router that rounds may choose another expert
    assert moved(output(wide), output(load(case.out, torch.float32))) <= allowed(case.dtype)
    residual = moved(output(wide), output(load(case.out, torch.float32, adapter=False)))
    assert residual > 3 * allowed(case.dtype)
    wrapped = [name for name, module in loaded.named_modules() if type(module).__name__ == "ParamWrapper"]
    assert len(wrapped) == len(case.report.layers) == len(stacks(case.model))


def test_every_expert_is_what_peft_merges(case: Case) -> None:
    """W_res + s·B·A is W to the one rounding of W_res, as PEFT computes the product."""
    residuals = dict(stacks(load(case.out, torch.float64, adapter=False)))
    merged = dict(stacks(load(case.out, torch.float64).merge_and_unload()))
    found = 0
    for name, stack in stacks(case.model):
        change = (merged[name] - residuals[name]).abs()
        bound = ROUNDOFF[case.dtype] * residuals[name].abs() * 1.001 + 64 * ROUNDOFF[torch.float32] * (
            change + stack.double().abs() + stack.double().abs().mean()
        )
        assert ((merged[name] - stack.double()).abs() <= bound).all(), name
        assert change.mean(dim=(1, 2)).min() > 0.05 * stack.double().abs().mean(), "every expert has its factors"
        found += 1
    assert found == len(case.report.layers)


def test_every_expert_against_float64(case: Case) -> None:
    found = dict(deficits(case.model, case.out))
    limit = 1e-6 if case.dtype == torch.float32 else 2.5e-6
    assert found, "there are stacks"
    assert max(found.values()) <= limit + ROUNDOFF[case.dtype] ** 2
    report = {layer.name: layer for layer in case.report.layers}
    assert list(report) == [name for name, _ in stacks(case.model)]
    for name, stack in stacks(case.model):
        layer = report[name]
        exact = torch.linalg.svdvals(stack.double())[:, :RANK]
        assert [part.name for part in layer.parts] == [f"{name}[{index}]" for index in range(EXPERTS)]
        sigma = torch.stack([part.singular_values for part in layer.parts]).double()
        assert (sigma - exact).abs().max() <= 1e-5 * exact.max()
        assert layer.certificate.converged
        squares = stack.double().square().sum()
        assert layer.certificate.energy == pytest.approx(float(exact.square().sum() / squares), rel=1e-5)


def test_everything_else_is_copied(case: Case) -> None:
    before, after = contents(case.folder), contents(case.out)
    assert after.keys() == before.keys() | ADDED | {"pissa_init"}
    for name, content in before.items():
        if name.endswith(".safetensors"):
            assert header(case.folder / name) == header(case.out / name)
        else:
            assert after[name] == content, name
    old, new = tensors(case.folder), tensors(case.out)
    targets = {name for name in old if ".experts." in name and not name.endswith("_bias")}
    assert targets
    assert old.keys() - targets
    for name, value in old.items():
        assert torch.equal(value.view(torch.uint8), new[name].view(torch.uint8)) == (name not in targets), name
    assert sorted(path.name for path in case.out.parent.iterdir()) == ["model", "out"]


def test_adapter_is_what_peft_writes(case: Case, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=BOTH, task_type="CAUSAL_LM", inference_mode=True
    )
    peft.get_peft_model(moe(case.name, case.dtype), config, autocast_adapter_dtype=False).save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    found = load_file(case.out / ADAPTER)
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }
    written = json.loads((case.out / "pissa_init" / "adapter_config.json").read_text())
    of_peft = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_parameters"] == sorted(of_peft["target_parameters"]) == sorted(BOTH)
    assert written["target_modules"] == of_peft["target_modules"] == []
    same = written.keys() - {"target_parameters", "base_model_name_or_path"}
    assert {key: written[key] for key in same} == {key: of_peft[key] for key in same}


def test_verify_finds_nothing(case: Case) -> None:
    found = pk.verify_checkpoint(case.folder, case.out, progress=False)
    assert found == []
    assert [layer.name for layer in found.layers] == [layer.name for layer in case.report.layers]
    assert all(len(layer.parts) == EXPERTS for layer in found.layers)
    assert all(0 < layer.reconstruction <= 1 for layer in found.layers)
    residuals = [name for name in tensors(case.folder) if ".experts." in name and not name.endswith("_bias")]
    assert found.copied == len(tensors(case.folder)) - len(residuals)


def test_manifest_names_every_matrix(case: Case) -> None:
    manifest = json.loads((case.out / "pissa_manifest.json").read_text())
    old = tensors(case.folder)
    rows: dict[tuple[str, int], list[list[int]]] = {}
    for tensor, about in manifest["targets"].items():
        assert f"base_model.model.{about['key']}.lora_A.weight" in load_file(case.out / ADAPTER)
        assert about["transposed"] == (case.name == "gpt_oss")
        if case.fused:
            assert about["experts"] == len(old[tensor]) == EXPERTS
            continue
        rows.setdefault((about["layer"], about["expert"]), []).append(about["rows"])
        first, last = about["rows"]
        stack = dict(stacks(case.model))[about["layer"]]
        assert torch.equal(old[tensor], stack[about["expert"], first:last]), tensor
    assert len(rows) == (0 if case.fused else EXPERTS * len(stacks(case.model)))


# Runs


def test_bytes_do_not_depend_on_workers_or_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on the rows of B that are interleaved at a time."""
    model = saved(moe("mixtral", torch.bfloat16), tmp_path / "model")
    init(model, tmp_path / "a" / "out", workers=1)
    expected = untimed(tmp_path / "a" / "out")
    (tmp_path / "a" / "out").rename(tmp_path / "one")
    monkeypatch.setattr(staging, "PACKED_BYTES", 3 * EXPERTS * RANK * 2)
    init(model, tmp_path / "a" / "out", workers=3)
    assert untimed(tmp_path / "a" / "out") == expected


def test_layouts_have_one_adapter(tmp_path: Path) -> None:
    """Experts one by one and fused, in one file or many: the same adapter, and the same model."""
    model = moe("qwen3_moe")
    outs = []
    for fused, shard in ((False, "20KB"), (True, "1GB")):
        folder = saved(model, tmp_path / f"model-{fused}", fused=fused, shard=shard)
        init(folder, tmp_path / f"out-{fused}")
        outs.append(tmp_path / f"out-{fused}")
    assert (outs[0] / ADAPTER).read_bytes() == (outs[1] / ADAPTER).read_bytes()
    one, other = (dict(load(out, torch.float32, adapter=False).state_dict()) for out in outs)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_parameters_beside_modules(tmp_path: Path) -> None:
    model = moe("mixtral")
    folder = saved(model, tmp_path / "model")
    report = init(
        folder, tmp_path / "out", target_modules=["q_proj", "o_proj"], target_parameters=["1.mlp.experts.gate_up_proj"]
    )
    names = [f"model.layers.{index}.self_attn.{name}" for index in (0, 1) for name in ("q_proj", "o_proj")]
    assert [layer.name for layer in report.layers] == [*names, "model.layers.1.mlp.experts.gate_up_proj"]
    assert moved(output(model), output(load(tmp_path / "out", torch.float32))) <= allowed(torch.float32)
    assert pk.verify_checkpoint(folder, tmp_path / "out", progress=False) == []
    assert "base_model.model.model.layers.1.mlp.experts.lora_A.weight" in load_file(tmp_path / "out" / ADAPTER)


def test_ranks_and_scalings_of_parameters(tmp_path: Path) -> None:
    """Patterns name parameters, and a stack that is narrower than the rank gets all that it has."""
    model = moe("qwen3_moe")
    folder = saved(model, tmp_path / "model")
    notes: list[str] = []
    report = init(
        folder,
        tmp_path / "out",
        rank=30,
        alpha=15,
        rank_pattern={r"0.mlp.experts.gate_up_proj": 3},
        alpha_pattern={"experts.down_proj": 60},
        on_plan=lambda job: notes.extend(job.notes()),
    )
    found = {layer.name.removeprefix("model.layers."): (layer.rank, layer.scaling) for layer in report.layers}
    assert found == {
        "0.mlp.experts.gate_up_proj": (3, 5.0),
        "0.mlp.experts.down_proj": (24, 2.0),
        "1.mlp.experts.gate_up_proj": (30, 0.5),
        "1.mlp.experts.down_proj": (24, 2.0),
    }
    assert any("narrower than the rank" in note and "down_proj (rank 24 instead of 30)" in note for note in notes)
    assert moved(output(model), output(load(tmp_path / "out", torch.float32))) <= allowed(torch.float32)
    assert pk.verify_checkpoint(folder, tmp_path / "out", progress=False) == []
    assert max(deficit for _, deficit in deficits(model, tmp_path / "out")) <= 1e-6


def test_experts_that_all_linear_leaves_out_are_named(tmp_path: Path) -> None:
    """PEFT's all-linear has no stacks for gpt_oss."""
    folder = saved(moe("gpt_oss"), tmp_path / "model")
    report = pk.init_checkpoint(folder, tmp_path / "out", rank=RANK, progress=False)
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    (note,) = report.notes  # type: ignore[attr-defined]
    assert note.startswith("not among all-linear, and stay as they are: model.layers.0.mlp.experts.gate_up_proj, ")
    assert note.endswith("; --target-parameters experts.down_proj experts.gate_up_proj adapts them")
    both = pk.init_checkpoint(
        folder,
        tmp_path / "both",
        rank=RANK,
        target_modules="all-linear",
        target_parameters=BOTH,
        progress=False,
    )
    assert len(both.layers) == len(report.layers) + len(stacks(moe("gpt_oss")))
    assert both.notes == ()  # type: ignore[attr-defined]
    assert pk.verify_checkpoint(folder, tmp_path / "both", progress=False) == []


def test_a_single_expert(tmp_path: Path) -> None:
    model = moe("mixtral", experts=1)
    model.config.num_experts_per_tok = 1
    folder = saved(transformers.MixtralForCausalLM(model.config).eval(), tmp_path / "model")
    expected = output(transformers.MixtralForCausalLM.from_pretrained(folder).eval())
    init(folder, tmp_path / "out")
    assert moved(expected, output(load(tmp_path / "out", torch.float32))) <= allowed(torch.float32)
    assert pk.verify_checkpoint(folder, tmp_path / "out", progress=False) == []


def test_dry_run_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(moe("mixtral", torch.bfloat16), tmp_path / "model")
    command = ["init", str(folder), str(tmp_path / "out"), "--rank", "4", "--target-parameters", "gate_up_proj"]
    assert main([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"gate_up_proj  {EXPERTS}×48×40" in text
    assert f"{2 * 2 * EXPERTS} tensors become residuals" in text
    assert main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [target["experts"] for target in plan["targets"]] == [EXPERTS, EXPERTS]
    assert len(plan["targets"][0]["tensors"]) == 2 * EXPERTS
    assert main([*command, "--json"]) == 0
    *events, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert sorted(event["expert"] for event in events if "expert" in event) == sorted([*range(EXPERTS)] * 2)
    assert done["tensors"] == len(events)
    assert len(layers(tmp_path / "out")) == 2
    assert main(["verify", str(folder), str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(layer["parts"]) for layer in found["layers"]] == [EXPERTS, EXPERTS]


# Quantized results


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_linear_layers_are_quantized_and_experts_are_not(name: str, tmp_path: Path) -> None:
    """The layers around the experts are quantized as transformers does it, and the experts are residuals."""
    folder = saved(moe(name), tmp_path / "model")
    out = tmp_path / "out"
    notes: list[str] = []
    init(folder, out, quantize="nf4", on_plan=lambda job: notes.extend(job.notes()))
    (note,) = [note for note in notes if "bitsandbytes" in note]
    assert note.startswith("stay in their dtype, as bitsandbytes quantizes linear layers alone: model.layers.0.mlp.exp")
    assert pk.verify_checkpoint(folder, out, progress=False) == []
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    load_stock = transformers.AutoModelForCausalLM.from_pretrained
    stock = load_stock(folder, quantization_config=config, dtype=torch.float32).eval()
    residual = load_stock(out, dtype=torch.float32).eval()
    kinds = [{type(module).__name__ for module in model.modules()} for model in (stock, residual)]
    assert kinds[0] == kinds[1]
    assert "Linear4bit" in kinds[0]
    assert all(stack.dtype == torch.float32 for _, stack in stacks(residual))
    expected = output(stock)
    assert moved(expected, output(residual)) > 3 * allowed(torch.float32)
    adapted = peft.PeftModel.from_pretrained(residual, out, subfolder="pissa_init").eval()
    assert moved(expected, output(adapted)) <= allowed(torch.float32)


def test_quantized_modules_beside_experts(tmp_path: Path) -> None:
    folder = saved(moe("deepseek_v3", torch.bfloat16), tmp_path / "model")
    report = init(folder, tmp_path / "out", target_modules=["o_proj"], quantize="nf4")
    found = {layer.name: layer for layer in report.layers}
    assert [layer.quantization is not None for layer in found.values()] == [".o_proj" in name for name in found]
    assert sum(bool(layer.parts) for layer in found.values()) == 2
    checked = pk.verify_checkpoint(folder, tmp_path / "out", progress=False)
    assert checked == []
    assert len(checked.layers) == 2
    loaded = load(tmp_path / "out", torch.bfloat16)
    assert output(loaded).isfinite().all()
