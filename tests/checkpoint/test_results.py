"""Results of init_checkpoint: plain transformers and PEFT load a model with the outputs of the original one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import pissa_kernels as pk
from pissa_kernels.checkpoint.options import AdapterOptions
from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.run import run_job

from ..support.adapted import allowed, assert_same, lora_layers, moved, state
from ..support.checkpoints import ADAPTER, ADDED, contents, factors, header, layers, save, tensors, tied_llama
from ..support.models import TARGETS, build, output
from ..support.reference import ROUNDOFF, energy_deficit
from ..test_pissa import assert_reconstructs


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small take longer on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def init(model: Path, out: Path, workers: int = 2, **options: Any) -> Path:
    settings = {"rank": 4} | options
    run_job(plan_checkpoint(model, out, AdapterOptions(**settings)), workers=workers, progress=False)
    return out


def load(out: Path, model: Any, adapter: bool = True) -> Any:
    """Load a result with transformers and PEFT."""
    kind = "AutoModelForCausalLM" if hasattr(model, "lm_head") else "AutoModel"
    base = getattr(transformers, kind).from_pretrained(out, dtype="auto")
    return peft.PeftModel.from_pretrained(base, out, subfolder="pissa_init", is_trainable=True) if adapter else base


@dataclass
class Case:
    """One checkpoint and its result.

    Attributes:
        name: architecture.
        model: the original model.
        folder, out: the checkpoint and the result.
    """

    name: str
    model: Any
    folder: Path
    out: Path

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def transposed(self) -> bool:
        return self.name == "gpt2"


CASES = [
    ("llama", torch.bfloat16, "100KB"),
    ("mistral", torch.float16, "1GB"),
    ("gpt2", torch.float32, "100KB"),
    ("gpt2", torch.bfloat16, "1GB"),
    ("bert", torch.bfloat16, "100KB"),
    ("bert", torch.float32, "1GB"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}-{case[2]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, dtype, shard = request.param
    folder, model = tmp_path_factory.mktemp(name), build(name, dtype)
    save(model, folder / "model", shard)
    assert len(list((folder / "model").glob("*.safetensors"))) == 1 or shard != "1GB"
    init(folder / "model", folder / "out")
    return Case(name, model, folder / "model", folder / "out")


def test_output_is_unchanged(case: Case) -> None:
    loaded = load(case.out, case.model).eval()
    assert loaded.get_base_model().dtype == case.dtype
    assert moved(output(case.model), output(loaded)) <= allowed(case.dtype)
    assert moved(output(case.model), output(load(case.out, case.model, adapter=False))) > 3 * allowed(case.dtype)


def test_weights_against_float64(case: Case) -> None:
    before, after = tensors(case.folder), tensors(case.out)
    report = pk.Report.read(case.out / "pissa_init" / "pissa_report.json")
    names = [name for name, module in case.model.named_modules() if name.rpartition(".")[2] in TARGETS[case.name]]
    found = {layer.name: layer for layer in report.layers}
    assert set(names) <= found.keys(), "all-linear includes these, and BERT's pooler"
    for name, layer in found.items():
        W, residual = before[f"{name}.weight"], after[f"{name}.weight"]
        A, B = factors(case.out, name)
        assert residual.dtype == A.dtype == B.dtype == case.dtype
        d = pk.Decomposition(
            lora_A=A.float(),
            lora_B=B.float(),
            residual=residual,
            singular_values=layer.singular_values,
            certificate=layer.certificate,
        )
        assert_reconstructs(W, d, 1.0, case.transposed)
        oriented = W.mT if case.transposed else W
        assert energy_deficit(oriented, A) <= 1e-6 + ROUNDOFF[case.dtype] ** 2
        exact = torch.linalg.svdvals(W.double())
        assert (layer.singular_values.double() - exact[:4]).abs().max() <= 1e-5 * exact[0]
        assert layer.certificate.converged


def test_every_factor_gets_a_gradient(case: Case) -> None:
    loaded = load(case.out, case.model).train()
    ids = torch.arange(24).reshape(2, 12)
    if hasattr(case.model, "lm_head"):
        loss = loaded(input_ids=ids, labels=ids).loss
    else:
        loss = loaded(input_ids=ids).last_hidden_state.float()[:, 0].square().mean()
    loss.backward()
    reached = {name for name, p in loaded.named_parameters() if p.grad is not None and p.grad.count_nonzero() > 0}
    assert reached == {name for name, _ in loaded.named_parameters() if "lora_" in name and ".pooler." not in name}, (
        "the pooler's output is no part of this loss"
    )


def test_everything_else_is_copied(case: Case) -> None:
    before, after = contents(case.folder), contents(case.out)
    assert after.keys() == before.keys() - {"pytorch_model.bin"} | ADDED | {"pissa_init"}
    targets = {f"{layer['name']}.weight" for layer in layers(case.out)}
    for name, content in before.items():
        if name.endswith(".safetensors"):
            assert header(case.folder / name) == header(case.out / name)
        elif name != "pytorch_model.bin":
            assert after[name] == content, name
    old, new = tensors(case.folder), tensors(case.out)
    assert old.keys() - targets
    for name, value in old.items():
        assert torch.equal(value.view(torch.uint8), new[name].view(torch.uint8)) == (name not in targets), name
    assert [path.name for path in sorted(case.out.parent.iterdir())] == ["model", "out"]


def test_adapter_config(case: Case) -> None:
    config = json.loads((case.out / "pissa_init" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == str(case.out)
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 4, case.transposed)
    assert config["task_type"] == ("CAUSAL_LM" if hasattr(case.model, "lm_head") else None)


def test_same_bits_as_peft_with_the_hook(case: Case) -> None:
    """Initialized in memory; the layers are in PEFT's order."""
    original = load(case.folder, case.model, adapter=False)
    config = peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="pissa", target_modules="all-linear", fan_in_fan_out=case.transposed
    )
    with pk.patch_peft() as report:
        adapted = peft.get_peft_model(original, config)
    assert_same(state(load(case.out, case.model)), state(adapted))
    found = pk.Report.read(case.out / "pissa_init" / "pissa_report.json")
    assert [layer.name for layer in found.layers] == [layer.name for layer in report.layers]
    for one, other in zip(found.layers, report.layers, strict=True):
        assert torch.equal(one.singular_values, other.singular_values)
        assert one.certificate == other.certificate


@pytest.mark.parametrize("workers", [1, 5])
def test_bytes_do_not_depend_on_the_number_of_workers(case: Case, workers: int, tmp_path: Path) -> None:
    again = init(case.folder, tmp_path / "out", workers)
    assert contents(again)[ADAPTER] == contents(case.out)[ADAPTER]
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in case.out.glob("*.safetensors"))


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 8.0, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 7}, "alpha_pattern": {"v_proj": 12.0}},
        {"target_modules": ("q_proj", "layers.1.mlp.up_proj"), "exclude_modules": ("model.layers.0.self_attn.q_proj",)},
        {"target_modules": (r"model\.layers\.\d+\.mlp\.\w+_proj",), "exclude_modules": (r".*\.up_proj",)},
        {"init": "pissa_niter_2", "seed": 3},
    ],
    ids=["rslora", "patterns", "names", "regex", "niter"],
)
def test_options_mean_what_they_mean_in_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama", torch.bfloat16)
    out = init(save(model, tmp_path / "model"), tmp_path / "out", **options)
    names = {"target_modules": "all-linear"} | {
        key: options[key][0] if len(options[key]) == 1 and "\\" in options[key][0] else list(options[key])
        for key in ("target_modules", "exclude_modules")
        if key in options
    }
    config = peft.LoraConfig(
        r=4,
        lora_alpha=options.get("alpha", 4),
        use_rslora=options.get("use_rslora", False),
        rank_pattern=options.get("rank_pattern", {}),
        alpha_pattern=options.get("alpha_pattern", {}),
        init_lora_weights=options.get("init", "pissa"),
        **names,
    )
    with pk.patch_peft(seed=options.get("seed", 0)):
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
    loaded = load(out, model)
    assert_same(state(loaded), state(adapted))
    scalings = [
        {name: layer.scaling["default"] for name, layer in lora_layers(found).items()} for found in (loaded, adapted)
    ]
    assert scalings[0] == scalings[1]
    assert moved(output(model), output(loaded.eval())) <= allowed(torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_weights_stay_tied(name: str, tmp_path: Path) -> None:
    model = tied_llama() if name == "llama" else build(name)
    save(model, tmp_path / "model")
    assert "lm_head.weight" not in tensors(tmp_path / "model")
    loaded = load(init(tmp_path / "model", tmp_path / "out"), model).eval()
    base = loaded.get_base_model()
    assert base.lm_head.weight is base.get_input_embeddings().weight
    assert torch.equal(base.lm_head.weight, model.lm_head.weight)
    assert moved(output(model), output(loaded)) <= allowed(torch.float32)


def test_links_are_copied_as_files(tmp_path: Path) -> None:
    """From a folder of links, as in the hub's cache."""
    save(build("llama", torch.bfloat16), tmp_path / "blobs")
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    made = contents(init(tmp_path / "model", tmp_path / "out"))
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert made["code/modeling.py"] == (tmp_path / "blobs" / "code" / "modeling.py").read_bytes()
    straight = contents(init(tmp_path / "blobs", tmp_path / "straight"))
    assert all(made[name] == straight[name] for name in made if name.endswith(".safetensors"))
