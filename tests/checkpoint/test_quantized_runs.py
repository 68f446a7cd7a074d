"""Quantized runs: the same bytes for any number of workers and processes, killed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from pissa_kernels.checkpoint.options import AdapterOptions
from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.quantization import QuantizationOptions
from pissa_kernels.checkpoint.run import run_job
from pissa_kernels.files.header import read_header

from ..support.checkpoints import save, tensors, untimed
from ..support.crashing import KILLED, Child, start
from ..support.models import build

NF4 = QuantizationOptions("nf4", double=True, iterations=2)
# A residual in NF4, one in bfloat16, quantized layers without an adapter, and copies.
OPTIONS = AdapterOptions(rank=4, target_modules=("q_proj", "lm_head"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", torch.bfloat16, width=64, layers=1), tmp_path_factory.mktemp("source") / "model", "40KB")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the results, and everything that one worker writes to it."""
    out = tmp_path_factory.mktemp("results") / "out"
    run_job(plan_checkpoint(model, out, OPTIONS, quantize=NF4), workers=1, progress=False)
    return out, untimed(out.parent)


@pytest.fixture
def out(expected: tuple[Path, dict[str, Any]]) -> Path:
    for path in expected[0].parent.iterdir():
        shutil.rmtree(path)
    return expected[0]


def test_two_workers(model: Path, expected: tuple[Path, dict[str, Any]], out: Path) -> None:
    run_job(plan_checkpoint(model, out, OPTIONS, quantize=NF4), workers=2, progress=False)
    assert untimed(out.parent) == expected[1]


def test_two_processes(model: Path, expected: tuple[Path, dict[str, Any]], out: Path) -> None:
    children = start(model, out, 2, options=OPTIONS, quantize=NF4)
    assert [child.ended() for child in children] == [0, 0]
    assert untimed(out.parent) == expected[1]


@pytest.mark.parametrize("step", [("pwritev", 1), ("pwritev", 30), ("journal", 0), ("journal", 5), ("journal", 11)])
def test_killed_and_resumed(
    step: tuple[str, int], model: Path, expected: tuple[Path, dict[str, Any]], out: Path
) -> None:
    child = Child(model, out, workers=1, step=step, torn=step[0] == "pwritev", options=OPTIONS, quantize=NF4)
    assert child.ended() == KILLED
    assert not out.exists()
    report = run_job(plan_checkpoint(model, out, OPTIONS, quantize=NF4), resume=True, progress=False)
    if step[0] == "journal":
        assert report.kept == step[1]
    assert untimed(out.parent) == expected[1]


@pytest.mark.parametrize("what", ["codes", "absmax", "nested_absmax", "quant_state", "factor"])
def test_lost_bytes_are_written_again(what: str, model: Path, expected: tuple[Path, dict[str, Any]], out: Path) -> None:
    """As after a power cut: a tensor is in the journal, but a part of what belongs to it is not on the disk."""
    child = Child(model, out, workers=1, step=("journal", 8), options=OPTIONS, quantize=NF4)
    assert child.ended() == KILLED
    folder = out.parent / ".out.unfinished"
    records = map(json.loads, (folder / "journal-0.jsonl").read_text().splitlines())
    record = next(record for record in records if "statistics" in record)
    names = {"codes": record["tensor"], "factor": next(iter(record["adapter"]))}
    name = names.get(what) or next(name for name in record["statistics"] if f".weight.{what}" in name)
    path = folder / "out" / ("pissa_init/adapter_model.safetensors" if what == "factor" else record["shard"])
    info = read_header(path).tensors[name]
    content = path.read_bytes()
    path.write_bytes(content[: info.start] + bytes(info.nbytes) + content[info.stop :])
    report = run_job(plan_checkpoint(model, out, OPTIONS, quantize=NF4), resume=True, progress=False)
    assert report.kept == 7
    assert untimed(out.parent) == expected[1]


@pytest.mark.parametrize(
    "other", [None, QuantizationOptions("nf4", iterations=2), QuantizationOptions("nf4", double=True, iterations=3)]
)
def test_resumed_with_other_options(other: QuantizationOptions | None, model: Path, out: Path) -> None:
    child = Child(model, out, workers=1, step=("journal", 2), options=OPTIONS, quantize=NF4)
    assert child.ended() == KILLED
    with pytest.raises(ValueError, match=r"was started with (quantization|adapter_header) .*; --force starts again"):
        run_job(plan_checkpoint(model, out, OPTIONS, quantize=other), resume=True, progress=False)


def test_plan_and_layout(model: Path, tmp_path: Path) -> None:
    """Every byte has its place in the plan, and the index lists what the shards hold."""
    out = tmp_path / "out"
    job = plan_checkpoint(model, out, OPTIONS, quantize=NF4)
    report = run_job(job, progress=False)
    for name, header in job.headers.items():
        assert read_header(out / name) == header
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == sorted(path.name for path in model.glob("*.safetensors"))
    assert len(shards) > 2
    found = {name: shard for shard in shards for name in read_header(out / shard).tensors}
    assert index["weight_map"] == found
    before = json.loads((model / "model.safetensors.index.json").read_text())
    for name, shard in before["weight_map"].items():
        assert found[name] == shard
        assert all(found[other] == shard for other in found if other.startswith(f"{name}."))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(out).values())
    assert report.size == sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert report.size < sum(path.stat().st_size for path in model.glob("*.safetensors"))
    manifest = json.loads((out / "pissa_manifest.json").read_text())
    assert manifest["plan"]["quantization"]["bitsandbytes"] == bitsandbytes.__version__
    assert {layer.name: layer.quantization is not None for layer in report.layers} == {
        "model.layers.0.self_attn.q_proj": True,
        "lm_head": False,
    }
