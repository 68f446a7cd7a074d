"""verify on folders that do not belong together, and on manifests, reports and files that were replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pissa_kernels as pk
from pissa_kernels.cli.main import main

from ..support.checkpoints import ADAPTER, REPORT, contents, small
from ..support.models import build

MANIFEST = "pissa_manifest.json"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    """A result to spoil."""
    return Path(shutil.copytree(written, tmp_path / "out"))


def problems(base: Path, out: Path) -> dict[str, str]:
    before = contents(out)
    found = dict(pk.verify_checkpoint(base, out, workers=1, progress=False))
    assert contents(out) == before
    return found


def sealed(record: dict[str, Any]) -> str:
    """The text of a manifest with the hash of its contents."""
    record = {key: value for key, value in record.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((out / MANIFEST).read_text())
    assert sealed(record) == (out / MANIFEST).read_text()
    change(record)
    (out / MANIFEST).write_text(sealed(record))


def edit_report(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the report and its hash."""
    record = json.loads((out / REPORT).read_text())
    change(record)
    (out / REPORT).write_text(json.dumps(record) + "\n")
    digest = hashlib.sha256((out / REPORT).read_bytes()).hexdigest()
    (out / f"{REPORT}.sha256").write_text(f"{digest}  pissa_report.json\n")


def rewrite(out: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write a file of tensors again, with all its hashes in the manifest, as a run that computed it so would have."""
    tensors = load_file(out / name)
    change(tensors)
    save_file(tensors, out / name, metadata={"format": "pt"})
    data = (out / name).read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    hashes = {
        key: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for key, tensor in tensors.items()
    }
    file = {"header": hashlib.sha256(header).hexdigest(), "tensors": hashes}
    edit_manifest(out, lambda record: record["files"].update({name: file}))


def shard_of(out: Path, tensor: str) -> str:
    return next(path.name for path in sorted(out.glob("*.safetensors")) if tensor in load_file(path))


def test_a_base_of_another_dtype(written: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", torch.float16)
    found = problems(base, written)
    assert found[f"{QUERY}.weight"] == "is BF16 (32, 32), not F16 (32, 32)"
    assert found["model.norm.weight"] == "is BF16 (32,), not F16 (32,)"
    assert "config.json" in found


def test_a_base_of_other_sizes(tmp_path: Path) -> None:
    for width in (32, 48):
        build("llama", torch.bfloat16, width=width, layers=1).save_pretrained(tmp_path / f"{width}")
    pk.init_checkpoint(tmp_path / "32", tmp_path / "out", rank=4, progress=False)
    found = problems(tmp_path / "48", tmp_path / "out")
    assert found[f"{QUERY}.weight"] == "is BF16 (32, 32), not BF16 (48, 48)"
    assert found["model.norm.weight"] == "is BF16 (32,), not BF16 (48,)"
    assert len(found) == 13, "every tensor, and the config"


def test_a_base_in_other_shards(written: Path, tmp_path: Path) -> None:
    build("llama", torch.bfloat16, width=32, layers=1).save_pretrained(tmp_path / "base")
    found = pk.verify_checkpoint(tmp_path / "base", written, progress=False)
    places = [finding.what for finding in found if finding.where == f"{QUERY}.weight"]
    assert places == [
        f"is not in {shard_of(written, f'{QUERY}.weight')} of the original",
        "is not in model.safetensors of the result's manifest",
    ]


def test_a_base_with_other_values(pristine: Path, written: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(pristine, tmp_path / "base"))
    name = shard_of(base, f"{QUERY}.weight")
    tensors = load_file(base / name)
    tensors[f"{QUERY}.weight"] *= 1.1
    save_file(tensors, base / name, metadata={"format": "pt"})
    [(where, what)] = problems(base, written).items()
    assert where == f"{QUERY}.weight"
    assert what.startswith("W_res + s·B·A differs from W by ")
    assert "; the energy is 0." in what


def test_another_model_with_the_same_names(written: Path, tmp_path: Path) -> None:
    """Weights that the names of the targets belong to, and that are no matrices there."""
    base = Path(shutil.copytree(small(tmp_path / "model"), tmp_path / "base"))
    for path in base.glob("*.safetensors"):
        tensors = {key: tensor.flatten() for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    assert problems(base, written)[f"{QUERY}.weight"] == "is BF16 (32, 32), not BF16 (1024,)"


def test_swapped_folders(pristine: Path, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(written), str(pristine)]) == 1
    assert capsys.readouterr().err == (
        f"pissa-kernels: error: {written} is a result of pissa-kernels init, not the original checkpoint: give the "
        "original first, then the result\n"
    )
    with pytest.raises(ValueError, match="not the original checkpoint"):
        pk.verify_checkpoint(written, written, progress=False)


def test_a_result_inside_the_base(pristine: Path, written: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(pristine, tmp_path / "base"))
    out = Path(shutil.copytree(written, base / "results" / "out"))
    assert problems(base, out) == {}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("residual", -1.0, "pissa_report.json is not a report: layers[0].certificate: residual is -1.0"),
        ("residual", float("nan"), "pissa_report.json is not a report: not JSON: NaN"),
        ("energy", "half", "pissa_report.json is not a report: layers[0].certificate: energy is"),
        ("energy", 1e300, "the energy is 0."),
        ("energy", 0.0, "the energy is 0."),
        ("residual", 1e300, "the certificate's residual of 1.0e+300 is larger than any"),
        ("singular_values", [0.0] * 4, "s·‖A‖² and s·‖B‖² are not the singular values"),
        ("singular_values", [3e38] * 4, "s·‖A‖² and s·‖B‖² are not the singular values"),
        ("scaling", 1e300, "W_res + s·B·A differs from W by "),
        ("scaling", 5e-324, "W_res + s·B·A differs from W by "),
        ("shape", [10**12, 10**12], "the report describes another weight than (32, 32) torch.bfloat16"),
        ("dtype", "float32", "the report describes another weight than (32, 32) torch.bfloat16"),
        ("name", "other", "cannot be checked without pissa_init/pissa_report.json"),
    ],
)
def test_reports_of_another_run(pristine: Path, out: Path, key: str, value: object, words: str) -> None:
    def change(record: dict[str, Any]) -> None:
        layer = next(layer for layer in record["layers"] if layer["name"] == QUERY)
        record["layers"].remove(layer)
        record["layers"].insert(0, layer)
        (layer["certificate"] if key in layer["certificate"] else layer)[key] = value

    edit_report(out, change)
    found = problems(pristine, out)
    assert any(words in what for what in found.values()), found
    assert main(["verify", str(pristine), str(out), "--json"]) == 1


def test_json_has_no_infinite_numbers(pristine: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_report(out, lambda record: record["layers"][0].update(dtype="float32"))
    assert main(["verify", str(pristine), str(out), "--json"]) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [layer["reconstruction"] for layer in record["layers"]].count(None) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("files"),
        lambda record: record.update(files=[]),
        lambda record: record.update(targets=None),
        lambda record: record["plan"].pop("source"),
        lambda record: record["plan"].update(source=3),
        lambda record: record["files"].update({"config.json": {}}),
        lambda record: record["files"].update({"config.json": "abc"}),
        lambda record: record["files"].update({"config.json": {"sha256": 1}}),
        lambda record: record["files"][ADAPTER].update(tensors=[]),
        lambda record: record["files"][ADAPTER].pop("header"),
        lambda record: record["targets"].update({f"{QUERY}.weight": {}}),
        lambda record: record["targets"].update({f"{QUERY}.weight": {"layer": QUERY, "transposed": 0}}),
    ],
)
def test_manifests_without_their_parts(pristine: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(out, change)
    with pytest.raises(ValueError, match=r"pissa_manifest\.json is damaged: "):
        pk.verify_checkpoint(pristine, out, progress=False)


A = f"base_model.model.{QUERY}.lora_A.weight"
B = f"base_model.model.{QUERY}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(A), f"adapter_model.safetensors has no tensor {A}"),
        (
            lambda tensors: tensors.update({A: tensors[A].float()}),
            "A is (4, 32) torch.float32, not the (4, 32) torch.bf",
        ),
        (lambda tensors: tensors.update({A: tensors[A][:3].clone()}), "A is (3, 32) torch.bfloat16"),
        (lambda tensors: tensors.update({B: tensors[B].mT.contiguous()}), "B is (4, 32) torch.bfloat16"),
        (lambda tensors: tensors.update({A: tensors[A].long()}), "A is (4, 32) torch.int64"),
        (lambda tensors: tensors.update({A: tensors[A].flatten()}), "A is (128,) torch.bfloat16"),
        (lambda tensors: tensors.update({A: tensors[A] * torch.nan}), "W_res + s·B·A differs from W by inf"),
        (lambda tensors: tensors.update({A: tensors[A] * 2, B: tensors[B] / 2}), "s·‖A‖² and s·‖B‖² are not"),
        (lambda tensors: tensors.update({A: -tensors[A], B: -tensors[B]}), ""),
    ],
    ids=["missing", "wider", "rank", "transposed", "integers", "flat", "nan", "unbalanced", "negated"],
)
def test_adapters_that_were_written_otherwise(
    pristine: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    rewrite(out, ADAPTER, change)
    found = problems(pristine, out)
    if words:
        assert words in found[f"{QUERY}.weight"]
    else:
        assert not found


def test_residuals_that_were_written_otherwise(pristine: Path, out: Path) -> None:
    tensor = f"{QUERY}.weight"
    name = shard_of(out, tensor)
    rewrite(out, name, lambda tensors: tensors.update({tensor: tensors[tensor].float()}))
    assert problems(pristine, out)[tensor] == "is F32 (32, 32), not BF16 (32, 32)"
    rewrite(out, name, lambda tensors: tensors.pop(tensor))
    assert problems(pristine, out)[tensor] == f"is not in {name} of the result's manifest"


@pytest.mark.parametrize("name", ["tokenizer.json", ADAPTER, REPORT, f"{REPORT}.sha256"])
def test_a_pipe_in_the_place_of_a_file(pristine: Path, out: Path, name: str) -> None:
    """Reading it would wait forever for a writer."""
    (out / name).unlink()
    os.mkfifo(out / name)
    found = dict(pk.verify_checkpoint(pristine, out, progress=False))
    assert found[name] == "is not a regular file"


@pytest.mark.parametrize("what", ["a pipe", "nothing"])
def test_a_file_that_the_base_lacks(what: str, model: Path, written: Path) -> None:
    (model / "tokenizer.json").unlink()
    if what == "a pipe":
        os.mkfifo(model / "tokenizer.json")
    found = dict(pk.verify_checkpoint(model, written, progress=False))
    assert found == {"tokenizer.json": f"is not a file in {model}"}


def test_weights_of_zeros(tmp_path: Path) -> None:
    model = build("llama", torch.float16, width=32, layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        model.model.layers[0].mlp.up_proj.weight.zero_()[3, 5] = 2.0
    model.save_pretrained(tmp_path / "base")
    pk.init_checkpoint(tmp_path / "base", tmp_path / "out", rank=4, progress=False)
    found = pk.verify_checkpoint(tmp_path / "base", tmp_path / "out", progress=False)
    assert not found
    layer = next(layer for layer in found.layers if layer.name == QUERY)
    assert (layer.reconstruction, layer.energy, layer.residual) == (0.0, 1.0, 0.0)
