"""What a conversion writes, and where it does not write."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.convert import plain
from pissa_kernels.convert.convert import convert_adapter
from pissa_kernels.convert.pair import AdapterPair
from pissa_kernels.files import header

from ..peft.test_models import config
from .adapters import rewrite


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
    before, stat = contents(copied), os.stat
    names = {str(copied / "mounted"): copied / "trained"}
    monkeypatch.setattr(os, "stat", lambda path, **options: stat(names.get(str(path), path), **options))
    with pytest.raises(FileExistsError, match="which is read"):
        convert_adapter(copied / "trained", copied / "residual", copied / "mounted", force=True)
    with pytest.raises(FileExistsError, match="which is read"):
        convert_adapter(copied / "trained", copied / "residual", copied / "mounted" / "new")
    assert contents(copied) == before
