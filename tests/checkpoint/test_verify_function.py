"""``pk.verify_checkpoint`` called from Python: arguments, findings, errors."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import pissa_kernels as pk

from ..support.checkpoints import REPORT, contents, tensors
from ..support.refusing import LAYER


@pytest.fixture(scope="module")
def result(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("result") / "out"
    pk.init_checkpoint(pristine, out, rank=4, progress=False)
    return out


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_verification(workers: int | None, pristine: Path, result: Path) -> None:
    found = pk.verify_checkpoint(pristine, result, workers=workers, progress=False)
    assert found == []
    assert isinstance(found, pk.Verification)
    assert isinstance(found, list)
    assert not found
    assert [layer.name for layer in found.layers] == [layer.name for layer in pk.Report.read(result / REPORT).layers]
    assert all(layer.problem == "" for layer in found.layers)
    assert (found.copied, found.extra) == (5, [])
    # every file but the safetensors and the manifest
    assert found.files == len([name for name, data in contents(result).items() if data is not None]) - 1 - len(
        list(result.rglob("*.safetensors"))
    )


def test_findings_are_sorted(pristine: Path, result: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(result, tmp_path / "out"))
    (out / "tokenizer.json").write_text("{}")
    (out / "config.json").unlink()
    (out / "added.txt").touch()
    for path in out.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[8 + int.from_bytes(data[:8], "little") :] = bytes(len(data) - 8 - int.from_bytes(data[:8], "little"))
        path.write_bytes(data)
    found = pk.verify_checkpoint(pristine, out, progress=False)
    assert all(isinstance(finding, pk.Finding) for finding in found)
    assert list(found) == sorted(found)
    what = {finding.where: finding.what for finding in found}
    assert what["tokenizer.json"] == "its bytes are not those that were written"
    assert what["config.json"] == "is missing"
    assert set(tensors(pristine)) <= what.keys()
    assert len(found) == len(tensors(pristine)) + 2
    assert re.match("its bytes are not those that were written; W_res", what[f"{LAYER}.weight"])
    where, text = found[0]
    assert (where, text) == (found[0].where, found[0].what)
    assert found.extra == ["added.txt"]
    assert (found.copied, len(found.layers)) == (0, 7)


def test_verify_errors(pristine: Path, result: Path, tmp_path: Path) -> None:
    def verify(base: Path, out: Path) -> None:
        pk.verify_checkpoint(base, out, progress=False)

    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        verify(pristine, tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        verify(tmp_path / "missing", result)
    with pytest.raises(NotADirectoryError, match=r"config.json is not a folder"):
        verify(pristine / "config.json", result)
    with pytest.raises(NotADirectoryError, match=r"config.json is not a folder"):
        verify(pristine, result / "config.json")
    with pytest.raises(FileNotFoundError, match=r"has no pissa_manifest.json: give a folder that pissa-kernels"):
        verify(pristine, pristine)
    out = Path(shutil.copytree(result, tmp_path / "out"))
    manifest = out / "pissa_manifest.json"
    whole = manifest.read_text()
    for text, words in [
        (whole.replace('"version": 1', '"version": 2'), "its format is not 'pissa_kernels checkpoint', version 1"),
        (whole.replace("q_proj", "x_proj", 1), "its contents do not match its hash"),
        (whole + " ", "its contents do not match its hash"),
        (whole[:-10], ""),
        ("[]", "its format is not"),
    ]:
        manifest.write_text(text)
        with pytest.raises(ValueError, match=f"pissa_manifest.json is damaged: {words}"):
            verify(pristine, out)
