"""What a conversion writes, and where it does not write."""

from __future__ import annotations

import copy
import errno
import json
import os
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest

from pissa_kernels.cli import main as cli
from pissa_kernels.convert import plain
from pissa_kernels.convert.convert import convert_adapter
from pissa_kernels.convert.pair import AdapterPair
from pissa_kernels.files import header

from ..support.adapted import config
from ..support.mounts import BindMounts
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
    for name in "README.md", "more/README.md":
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
        words = f"lora holds {Path(name).parts[0]}, which convert has not written and which would be lost; move it away"
        with pytest.raises(FileExistsError, match=words):
            convert_adapter(trained, initial, out, force=True)
        (out / name).unlink()
    (out / "more").rmdir()
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(FileExistsError, match=r"holds adapter_config\.json without adapter_model\.safetensors"):
        convert_adapter(trained, initial, out, force=True)
    (copied / "file").touch()
    (copied / "dangling").symlink_to("nowhere")
    (copied / "to file").symlink_to("file")
    for name, words in (
        ("file", "not a folder"),
        ("to file", "not a folder"),
        ("dangling", "a symbolic link to nowhere"),
    ):
        with pytest.raises(FileExistsError, match=words):
            convert_adapter(trained, initial, copied / name, force=True)
    for name in "file", "to file", "dangling":
        (copied / name).unlink()
    assert sorted(path.name for path in copied.iterdir()) == ["base", "lora", "residual", "trained"]


def test_an_adapter_that_was_trained_further_is_kept(llama: tuple[Path, Any, Any], copied: Path) -> None:
    """PEFT loads the result, and what it saves over it has no mark of this package."""
    trained, initial, out = copied / "trained", copied / "residual", copied / "lora"
    convert_adapter(trained, initial, out)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(llama[1]), out, is_trainable=True)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    before = contents(out)
    with pytest.raises(
        FileExistsError, match=r"adapter_model\.safetensors is not as convert writes it: it was trained"
    ):
        convert_adapter(trained, initial, out, force=True)
    (out / "adapter_model.safetensors").write_text("damaged")
    with pytest.raises(FileExistsError, match="is not as convert writes it"):
        convert_adapter(trained, initial, out, force=True)
    (out / "adapter_model.safetensors").write_bytes(before[str(out / "adapter_model.safetensors")] or b"")
    assert contents(out) == before
    from transformers import AutoModelForCausalLM

    convert_adapter(trained, initial, copied / "again")
    loaded = AutoModelForCausalLM.from_pretrained(copied / "base")
    loaded.load_adapter(str(copied / "again"))
    assert any("lora_A" in name for name, _ in loaded.named_parameters())


def test_what_is_saved_during_the_conversion_is_kept(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, initial, out = copied / "trained", copied / "residual", copied / "lora"
    convert_adapter(trained, initial, out)
    write = plain.write_plain

    def written(*arguments: Any) -> Any:
        (out / "README.md").write_text("mine")
        return write(*arguments)

    monkeypatch.setattr("pissa_kernels.convert.convert.write_plain", written)
    with pytest.raises(FileExistsError, match=r"lora holds README\.md, which convert has not written"):
        convert_adapter(trained, initial, out, rank=1, force=True)
    assert (out / "README.md").read_text() == "mine"
    assert json.loads((out / "adapter_config.json").read_text())["r"] > 1
    assert sorted(path.name for path in copied.iterdir()) == ["base", "lora", "residual", "trained"]


def test_mount_points_and_links(copied: Path) -> None:
    trained, initial = copied / "trained", copied / "residual"
    (copied / "disk").mkdir()
    (copied / "link").symlink_to("disk")
    with BindMounts() as mount:
        mount.add(copied / "disk", copied / "mounted")
        before = contents(copied)
        with pytest.raises(
            FileExistsError, match="mounted is a mount point, which cannot be replaced; choose a folder in"
        ):
            convert_adapter(trained, initial, copied / "mounted", force=True)
        assert contents(copied) == before
        convert_adapter(trained, initial, copied / "mounted" / "in")
    convert_adapter(trained, initial, copied / "link" / "in", force=True)
    (copied / "to").symlink_to("disk/in")
    convert_adapter(trained, initial, copied / "to", force=True)
    assert (copied / "to").is_symlink()
    assert sorted(path.name for path in (copied / "disk").iterdir()) == ["in"]


def test_the_model_around_the_initial_adapter_is_kept(copied: Path) -> None:
    """OUT may lie in it, where it replaces nothing."""
    initial = copied / "residual" / "pissa_init"
    (copied / "weights").mkdir()
    shard = next((copied / "residual").glob("*.safetensors"))
    shard.rename(copied / "weights" / shard.name)
    shard.symlink_to(f"../weights/{shard.name}")
    with pytest.raises(FileExistsError, match=r"weights holds model\S*, which convert has not written"):
        convert_adapter(copied / "trained", initial, copied / "weights", base=copied / "base", force=True)
    convert_adapter(copied / "trained", initial, copied / "residual" / "lora", base=copied / "base")


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


def test_a_full_disk_is_named(
    llama: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as os.pwrite does, without a file

    monkeypatch.setattr(plain, "write_at", full)
    out = tmp_path / "lora"
    assert cli.main(["convert", str(llama[0] / "trained"), str(llama[0] / "residual"), str(out)]) == 1
    assert capsys.readouterr().err == f"pissa-kernels: error: [Errno 28] No space left on device: '{out}'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_no_model_is_refused_before_its_folders_are_walked(
    llama: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"^/ is not a model folder: it has no config\.json"):
        convert_adapter(llama[0] / "trained", llama[0] / "residual", tmp_path / "lora", base="/")
