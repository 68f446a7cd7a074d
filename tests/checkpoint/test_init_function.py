"""``pk.init_checkpoint`` called from Python: arguments, report, callbacks, errors, example."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pissa_kernels as pk

from ..support.checkpoints import ADAPTER, REPORT, contents, tensors, witness
from ..support.refusing import call_after

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def init(model: Any, out: Any, **options: Any) -> pk.CheckpointReport:
    return pk.init_checkpoint(model, out, **{"rank": 4, "progress": False, **options})


def names(report: pk.Report) -> list[str]:
    return [layer.name.rpartition(".")[2] for layer in report.layers]


# Layers


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (None, ATTENTION + MLP),
        ("all-linear", ATTENTION + MLP),
        (["all-linear"], ATTENTION + MLP),
        ("q_proj", ["q_proj"]),
        (["v_proj", "q_proj"], ["q_proj", "v_proj"]),
        (("v_proj", "down_proj"), ["v_proj", "down_proj"]),
        (r".*\.mlp\.\w+_proj", MLP),
        ([r".*\.mlp\.\w+_proj"], MLP),
    ],
)
def test_target_modules(target_modules: Any, expected: list[str], pristine: Path, tmp_path: Path) -> None:
    assert names(init(pristine, tmp_path / "out", target_modules=target_modules)) == expected


@pytest.mark.parametrize(
    ("exclude_modules", "expected"),
    [
        (None, ATTENTION + MLP),
        ([], ATTENTION + MLP),
        ("q_proj", ATTENTION[1:] + MLP),
        (["q_proj", "down_proj"], ATTENTION[1:] + MLP[:2]),
        (r".*\.self_attn\..*", MLP),
    ],
)
def test_exclude_modules(exclude_modules: Any, expected: list[str], pristine: Path, tmp_path: Path) -> None:
    assert names(init(pristine, tmp_path / "out", exclude_modules=exclude_modules)) == expected


def test_ranks_and_scalings(pristine: Path, tmp_path: Path) -> None:
    ranks, alphas = {"q_proj": 2, "mlp.up_proj": 9}, {"v_proj": 12.0, "q_proj": 1.0}
    report = init(pristine, tmp_path / "out", alpha=8, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True)
    found = {layer.name.rpartition(".")[2]: (layer.rank, layer.scaling) for layer in report.layers}
    assert found["k_proj"] == (4, pytest.approx(8 / 4**0.5))
    assert found["q_proj"] == (2, pytest.approx(1 / 2**0.5))
    assert found["v_proj"] == (4, pytest.approx(12 / 4**0.5))
    assert found["up_proj"] == (9, pytest.approx(8 / 9**0.5))
    assert (ranks, alphas) == ({"q_proj": 2, "mlp.up_proj": 9}, {"v_proj": 12.0, "q_proj": 1.0})


def test_defaults(pristine: Path, tmp_path: Path) -> None:
    report = pk.init_checkpoint(str(pristine), str(tmp_path / "out"))
    assert {(layer.rank, layer.scaling, layer.init, layer.seed) for layer in report.layers} == {(16, 1.0, "pissa", 0)}


def test_paths_may_be_strings(pristine: Path, tmp_path: Path) -> None:
    init(pristine, tmp_path / "a" / "out", init="pissa_niter_2", seed=3)
    report = init(str(pristine), str(tmp_path / "b" / "out"), init="pissa_niter_2", seed=3, workers=3)
    assert {(layer.init, layer.seed) for layer in report.layers} == {("pissa_niter_2", 3)}
    first, second = (contents(tmp_path / name / "out") for name in "ab")
    assert [name for name in first if name.endswith("safetensors") and first[name] != second[name]] == []
    assert pk.verify_checkpoint(str(pristine), str(tmp_path / "b" / "out"), progress=False) == []


# Report


def test_report(pristine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = init(pristine, out)
    assert isinstance(report, pk.CheckpointReport)
    assert isinstance(report, pk.Report)
    assert (report.out, report.written, report.kept) == (out, 12, 0)
    assert report.size == sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert report.left_out == ("pytorch_model.bin",)
    assert len(report.layers) == 7
    assert all(layer.certificate.converged for layer in report.layers)
    assert report.seconds is not None
    assert report.seconds > 0
    assert report.to_json() + "\n" == (out / REPORT).read_text()
    assert pk.Report.read(out / REPORT).to_dict() == report.to_dict()
    assert repr(report).startswith("<CheckpointReport: 7 layers, rank 4, ")


def test_resume(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def fail() -> None:
        raise OSError("a disk failed")

    with monkeypatch.context() as patch:
        call_after(patch, 5, fail)
        with pytest.raises(OSError, match="a disk failed"):
            init(pristine, out, workers=1)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="out has an unfinished run; --resume continues it, --force starts again"):
        init(pristine, out)
    with pytest.raises(ValueError, match=r"was started with options {\"rank\": 4}, not {\"rank\": 5}"):
        init(pristine, out, rank=5, resume=True)
    report = init(pristine, out, resume=True)
    assert (report.kept, report.written) == (5, 7)
    assert report.seconds is None
    before = witness(out)
    report = init(pristine, out, resume=True)
    assert (report.kept, report.written, len(report.layers)) == (12, 0, 7)
    assert witness(out) == before
    assert pk.verify_checkpoint(pristine, out, progress=False) == []


def test_force(pristine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    init(pristine, out)
    before = witness(out)
    for options in {}, {"rank": 5, "resume": True}:
        with pytest.raises(FileExistsError, match="out exists and is not an empty folder; --force replaces it"):
            init(pristine, out, **options)
    assert witness(out) == before
    assert {layer.rank for layer in init(pristine, out, rank=5, force=True).layers} == {5}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Progress and callbacks


class Terminal:
    """A stderr that claims to be a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_progress(progress: bool, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bars of both functions; the warnings and bars of transformers are not theirs."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    init(pristine, tmp_path / "out", progress=progress)
    pk.verify_checkpoint(pristine, tmp_path / "out", progress=progress)
    monkeypatch.undo()
    assert ("PiSSA:" in terminal.text) == progress
    assert ("verify:" in terminal.text) == progress


def test_no_bar_where_stderr_is_not_a_terminal(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(pristine, tmp_path / "out", progress=True)
    assert pk.verify_checkpoint(pristine, tmp_path / "out") == []
    assert capsys.readouterr() == ("", "")


def test_on_plan_is_called_before_anything_is_written(pristine: Path, tmp_path: Path) -> None:
    plans: list[Any] = []

    def stop(job: Any) -> None:
        plans.append(job)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        init(pristine, tmp_path / "out", on_plan=stop)
    assert list(tmp_path.iterdir()) == []
    [job] = plans
    assert len(job.tensors) == 12
    assert sum(tensor.target is not None for tensor in job.tensors) == 7
    assert job.size == init(pristine, tmp_path / "out").size


def test_on_tensor(pristine: Path, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []

    def three(record: dict[str, Any]) -> None:
        records.append(record)
        if len(records) == 3:
            raise ValueError("the caller stops the run")

    with pytest.raises(ValueError, match="the caller stops the run"):
        init(pristine, tmp_path / "out", workers=1, on_tensor=three)
    stopped = len(records)
    init(pristine, tmp_path / "out", workers=1, on_tensor=records.append, resume=True)
    found = records[stopped:]
    assert sorted(record["tensor"] for record in found) == sorted(tensors(pristine))
    kept = [record for record in found if record["kept"]]
    assert len(kept) >= 3
    assert all(record["kept"] is False for record in records[:stopped])
    manifest = json.loads((tmp_path / "out" / "pissa_manifest.json").read_text())["files"]
    for record in found:
        assert record["sha256"] == manifest[record["shard"]]["tensors"][record["tensor"]]
        for key, sha256 in record.get("adapter", {}).items():
            assert sha256 == manifest[ADAPTER]["tensors"][key]
    assert sum("layer" in record for record in found) == 7


# Errors


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rank": 33}, ValueError, r"layer 'model\.layers\.0\.self_attn\.q_proj', weight \(32, 32\): .*got r=33"),
        ({"rank": 0}, ValueError, ".*rank|.*`r`"),
        ({"alpha": 0.0}, ValueError, r"alpha must be a finite number above 0, got 0\.0"),
        (
            {"init": "lora"},
            ValueError,
            r"init_lora_weights should be 'pissa' or 'pissa_niter_\[number of iters\]', got",
        ),
        ({"target_modules": "nope"}, ValueError, ".*nope.*not found"),
        ({"target_modules": "embed_tokens"}, ValueError, "layer 'model.embed_tokens' is a Embedding"),
    ],
)
def test_refused_options(
    options: dict[str, Any], error: type[Exception], words: str, pristine: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"^{words}"):
        init(pristine, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_refused_sources(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(TypeError, match=r"is quantized \(gptq\); PiSSA takes the float checkpoint"):
        init(model, tmp_path / "out")
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not a model folder: it has no config.json"):
        init(model, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        init(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(NotADirectoryError, match=r"tokenizer.json is not a folder; give the folder that holds"):
        init(model / "tokenizer.json", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_cuda_where_there_is_none(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device='cuda': this torch sees no CUDA device"):
        init(pristine, tmp_path / "out", device="cuda")
    assert list(tmp_path.iterdir()) == []
