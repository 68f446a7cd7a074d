"""The benchmark of whole models: what it builds, what its gate refuses, what a row says."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk
from bench.__main__ import main
from bench.harness.paths import RESULTS
from bench.harness.rows import read_rows
from bench.models import run
from bench.models.injection import STANDARD, Injection
from bench.models.llama import Base, ModelCase, targets

TINY = ["--layers", "2", "--width", "128", "--inner", "256", "--groups", "1", "--rank", "4", "--repeats", "1"]


pytestmark = pytest.mark.usefixtures("own_cache")


def test_every_projection_has_a_weight_of_its_own_or_repeats_one() -> None:
    base = Base(ModelCase(layers=2, width=128, inner=256, groups=1, rank=4, distinct=1))
    weights = [module.weight for _, module in targets(base.model)]
    assert len(weights) == 14
    assert all(torch.equal(one, other) for one, other in zip(weights[:7], weights[7:], strict=True))
    other = Base(ModelCase(layers=2, width=128, inner=256, groups=1, rank=4))
    assert not torch.equal(
        other.model.model.layers[0].mlp.up_proj.weight, other.model.model.layers[1].mlp.up_proj.weight
    )


def test_a_provider_streams_through_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(ModelCase(layers=1, width=64, inner=64, groups=1, rank=4))
    settings: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(pk, "patch_peft", lambda **given: settings.append(given) or contextlib.nullcontext())
    monkeypatch.setattr(peft, "get_peft_model", lambda model, config: model)
    for provider in ("ours pissa, through every GPU", "ours pissa, through the GPU"):
        Injection(base, provider, "cuda").run()
    assert settings == [{"device": ["cuda:0", "cuda:1", "cuda:2"]}, {"device": "cuda"}]


def test_rows_of_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["model", *TINY, "--no-memory", "--out", str(out)]) == 0
    rows = {row["provider"]: row for row in read_rows(out)}
    assert list(rows) == list(STANDARD["cpu"])
    for name, row in rows.items():
        assert list(row) == list(read_rows(RESULTS / "model-cpu.jsonl")[0]), "committed rows have other keys"
        assert row["ok"]
        assert row["min_ms"] > 0
        if name.startswith("ours"):
            assert row["energy_deficit"] <= 1e-5
            assert row["rounding"] <= 1
    assert rows["peft pissa_niter_4"]["energy_deficit"] > 1e-4
    assert rows["peft plain LoRA"]["energy_deficit"] is None
    # 2 layers of 4 square and 3 other projections, rank 4, float32
    assert rows["ours pissa"]["adapter_mib"] * 2**20 == 2 * 4 * 4 * (4 * 256 + 3 * 384)


@pytest.mark.slow
def test_a_process_of_its_own_measures_the_memory(tmp_path: Path) -> None:
    """A process takes ten seconds to import everything, so only one provider is measured."""
    out = tmp_path / "rows.jsonl"
    assert main(["model", *TINY, "--providers", "ours pissa", "--out", str(out)]) == 0
    [row] = read_rows(out)
    assert row["ok"]
    assert 0 < row["peak_extra_mib"] < 200


def test_runs_start_from_the_same_weights() -> None:
    base = Base(ModelCase(layers=1, width=128, inner=256, groups=1, rank=4))
    for name in ("ours pissa", "peft pissa_niter_4"):
        subject = Injection(base, name)
        subject.run()
        assert not torch.equal(
            base.adapted.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight,
            base.pristine["model.layers.0.mlp.up_proj"],
        )
        subject.restore()
        assert all(torch.equal(module.weight, base.pristine[key]) for key, module in targets(base.model))


def test_a_layer_without_numbers_is_not_hidden_by_the_others() -> None:
    base = Base(ModelCase(layers=1, width=128, inner=256, groups=1, rank=4))
    Injection(base, "ours pissa").run()
    base.adapted.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.data.fill_(torch.nan)
    assert not run.worst_deficit(base, "cpu")[1] <= 1


def test_a_sloppy_initializer_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pissa_kernels.peft.layers import layer as task

    real = task.principal_factors

    def sloppy(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        off = weight + 0.1 * weight.float().std() * torch.randn(weight.shape)
        return real(off.to(weight.dtype), *args, **kwargs)

    monkeypatch.setattr(task, "principal_factors", sloppy)
    out = tmp_path / "rows.jsonl"
    assert main(["model", *TINY, "--out", str(out), "--providers", "ours pissa", "--no-memory"]) == 1
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert not row["ok"]
    assert row["min_ms"] is None
    assert row["reason"].startswith("energy deficit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "100"], "--width must be a multiple of 512"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--dtype", "int8"], "--dtype must be one of bf16, fp16, fp32"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
