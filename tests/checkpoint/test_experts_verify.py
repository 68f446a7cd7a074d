"""verify on stacks of experts: what is damaged, exchanged or misplaced is found, and named by its expert."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pissa_kernels as pk

from ..support.checkpoints import ADAPTER
from ..support.experts import BOTH, EXPERTS, moe, saved
from .test_verify import flip
from .test_verify_inputs import edit_manifest, edit_report, problems

NAME = "model.layers.0.mlp.experts.gate_up_proj"
KEY_B = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
KEY_A = KEY_B.replace("lora_B", "lora_A")
FLIPS = 150


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with its experts one by one or fused, and the result of init."""
    root = tmp_path_factory.mktemp(request.param)
    base = saved(moe(request.param, torch.bfloat16, layers=1), root / "base")
    pk.init_checkpoint(base, root / "out", rank=4, target_parameters=BOTH, progress=False)
    return base, root / "out"


@pytest.fixture
def copies(result: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return result[0], Path(shutil.copytree(result[1], tmp_path / "out"))


def is_fused(out: Path) -> bool:
    return any(NAME in load_file(path) for path in out.glob("*.safetensors"))


def tensor_of(out: Path, expert: int) -> str:
    """The tensor with the first rows of an expert."""
    return NAME if is_fused(out) else f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of a file in place, which keeps its header."""
    before = path.read_bytes()
    values = load_file(path)
    change(values)
    save_file(values, path, {"format": "pt"})
    length = 8 + int.from_bytes(before[:8], "little")
    after = path.read_bytes()
    assert len(after) == len(before)
    path.write_bytes(before[:length] + after[length:])


def reseal(out: Path) -> None:
    """Give the manifest the hashes of what the files have now, so that only the values can be found to be wrong."""

    def change(record: dict[str, Any]) -> None:
        for name, about in record["files"].items():
            if "tensors" not in about:
                continue
            for tensor, value in load_file(out / name).items():
                parts = list(value) if isinstance(about["tensors"][tensor], list) else [value]
                hashes = [hashlib.sha256(part.contiguous().view(torch.uint8).numpy().tobytes()) for part in parts]
                digests = [one.hexdigest() for one in hashes]
                about["tensors"][tensor] = digests if isinstance(about["tensors"][tensor], list) else digests[0]

    edit_manifest(out, change)


def failed(base: Path, out: Path) -> list[int]:
    """Numbers of the experts of the layer that do not hold, as the findings and the layer's check name them."""
    found = pk.verify_checkpoint(base, out, progress=False)
    (check,) = [layer for layer in found.layers if layer.name == NAME]
    names = [part.name for part in check.parts if part.problem]
    named = [what.partition(":")[0] for _, what in found if what.startswith(f"{NAME}[")]
    assert sorted(named) == sorted(names)
    assert bool(names) == ("failed" in check.problem)
    return [int(name.rpartition("[")[2].removesuffix("]")) for name in names]


def shard_with(out: Path, tensor: str) -> Path:
    return next(path for path in out.glob("*.safetensors") if tensor in load_file(path))


def test_result_holds(result: tuple[Path, Path]) -> None:
    assert problems(*result) == {}


def test_resealing_changes_nothing(copies: tuple[Path, Path]) -> None:
    before = (copies[1] / "pissa_manifest.json").read_bytes()
    reseal(copies[1])
    assert (copies[1] / "pissa_manifest.json").read_bytes() == before


@pytest.mark.slow
def test_any_flipped_bit_is_found(copies: tuple[Path, Path]) -> None:
    base, out = copies
    files = [*sorted(out.glob("*.safetensors")), out / ADAPTER]
    generator = random.Random(0)
    for number in range(FLIPS):
        path = files[number % len(files)]
        bit = generator.randrange(8 * path.stat().st_size)
        flip(path, bit)
        assert problems(base, out), (path, bit)
        flip(path, bit)
    assert not problems(base, out)


def test_a_flipped_byte_is_named_by_its_expert(copies: tuple[Path, Path]) -> None:
    base, out = copies
    tensor = tensor_of(out, 7)

    def change(values: dict[str, torch.Tensor]) -> None:
        weight = values[tensor][7] if is_fused(out) else values[tensor]
        weight.view(torch.uint8)[3, 5] ^= 1

    rewrite(shard_with(out, tensor), change)
    found = [tuple(finding) for finding in pk.verify_checkpoint(base, out, progress=False)]
    whose = "the bytes of its matrix 7" if is_fused(out) else "its bytes"
    assert (tensor, f"{whose} are not those that were written") in found
    assert any(f"{NAME}[7]" in what for _, what in found)
    assert not any(f"{NAME}[{index}]" in what for index in range(EXPERTS) if index != 7 for _, what in found)


def test_exchanged_experts_are_found(copies: tuple[Path, Path]) -> None:
    """Hashes that fit hide nothing: the residual of another expert is not W − s·B·A of this one."""
    base, out = copies
    if is_fused(out):

        def change(values: dict[str, torch.Tensor]) -> None:
            values[NAME][[2, 10]] = values[NAME][[10, 2]]

        rewrite(shard_with(out, NAME), change)
    else:
        two, ten = tensor_of(out, 2), tensor_of(out, 10)
        values = [load_file(shard_with(out, name))[name] for name in (two, ten)]
        rewrite(shard_with(out, two), lambda tensors: tensors.update({two: values[1]}))
        rewrite(shard_with(out, ten), lambda tensors: tensors.update({ten: values[0]}))
    reseal(out)
    assert failed(base, out) == [2, 10]


def test_a_wrong_column_of_B_is_found(copies: tuple[Path, Path]) -> None:
    """Expert-major columns instead of rank-major ones have the same numbers, at other places."""
    base, out = copies

    def exchange(values: dict[str, torch.Tensor]) -> None:
        values[KEY_B][:, [4, 5]] = values[KEY_B][:, [5, 4]]

    rewrite(out / ADAPTER, exchange)
    assert problems(base, out)[NAME]
    assert (NAME, f"{KEY_B}'s bytes are not those that were written") in pk.verify_checkpoint(base, out, progress=False)
    assert failed(base, out) == [4, 5]
    reseal(out)
    assert failed(base, out) == [4, 5]
    rewrite(out / ADAPTER, exchange)

    def expert_major(values: dict[str, torch.Tensor]) -> None:
        values[KEY_B] = values[KEY_B].reshape(-1, 4, EXPERTS).mT.reshape(-1, 4 * EXPERTS).contiguous()

    rewrite(out / ADAPTER, expert_major)
    reseal(out)
    assert len(failed(base, out)) >= EXPERTS - 1, "the first column of the first expert is where it was"


def test_exchanged_rows_of_A_are_found(copies: tuple[Path, Path]) -> None:
    base, out = copies

    def exchange(values: dict[str, torch.Tensor]) -> None:
        values[KEY_A][[0, 4]] = values[KEY_A][[4, 0]]

    rewrite(out / ADAPTER, exchange)
    reseal(out)
    assert failed(base, out) == [0, 1]


def test_exchanged_gate_and_up_are_found(copies: tuple[Path, Path]) -> None:
    base, out = copies
    if is_fused(out):
        pytest.skip("one tensor has both")
    gate, up = (f"model.layers.0.block_sparse_moe.experts.4.{name}.weight" for name in ("w1", "w3"))
    values = [load_file(shard_with(out, name))[name] for name in (gate, up)]
    rewrite(shard_with(out, gate), lambda tensors: tensors.update({gate: values[1]}))
    rewrite(shard_with(out, up), lambda tensors: tensors.update({up: values[0]}))
    reseal(out)
    assert failed(base, out) == [4]


def test_a_manifest_of_other_matrices_is_found(copies: tuple[Path, Path]) -> None:
    base, out = copies
    text = (out / "pissa_manifest.json").read_text()
    tensor = tensor_of(out, 3)
    changes: list[dict[str, Any]] = (
        [{"experts": EXPERTS + 1}, {"transposed": False}]
        if is_fused(out)
        else [{"expert": EXPERTS}, {"expert": 4}, {"rows": [1, 25]}, {"rows": [0, 23]}, {"transposed": True}]
    )
    for change in changes:
        edit_manifest(out, lambda record, change=change: record["targets"][tensor].update(change))  # type: ignore[misc]
        assert "do not have the same matrices" in problems(base, out)[NAME], change
        (out / "pissa_manifest.json").write_text(text)
    edit_manifest(out, lambda record: record["targets"][tensor].update(key="model.elsewhere"))
    assert problems(base, out)
    (out / "pissa_manifest.json").write_text(text)
    for broken in ({"key": 1}, {"rows": [0]}, {"experts": 0}, {"expert": -1}, {"experts": True}, {"other": 1}):
        edit_manifest(out, lambda record, broken=broken: record["targets"][tensor].update(broken))  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"pissa_manifest\.json is damaged"):
            pk.verify_checkpoint(base, out, progress=False)
        (out / "pissa_manifest.json").write_text(text)


def test_a_report_of_other_experts_is_found(copies: tuple[Path, Path]) -> None:
    base, out = copies

    def layer(record: dict[str, Any]) -> dict[str, Any]:
        return next(found for found in record["layers"] if found["name"] == NAME)

    saved_report = (out / "pissa_init" / "pissa_report.json").read_text()
    digest = (out / "pissa_init" / "pissa_report.json.sha256").read_text()
    for change, words in (
        (lambda record: layer(record)["parts"].pop(), "do not have the same matrices"),
        (lambda record: layer(record).pop("parts"), "do not have the same matrices"),
        (lambda record: layer(record)["certificate"].update(energy=0.99), "is not that of its parts"),
        (lambda record: layer(record)["parts"].reverse(), ""),
    ):
        edit_report(out, change)
        if words:
            assert words in problems(base, out)[NAME]
        else:
            assert len(failed(base, out)) >= EXPERTS - 1
        (out / "pissa_init" / "pissa_report.json").write_text(saved_report)
        (out / "pissa_init" / "pissa_report.json.sha256").write_text(digest)
    assert not problems(base, out)


def test_missing_files_are_named(copies: tuple[Path, Path]) -> None:
    base, out = copies
    (out / ADAPTER).rename(out / "elsewhere")
    found = problems(base, out)
    assert found[ADAPTER] == "is missing"
    assert found[NAME] == f"cannot be checked without {ADAPTER}"
    (out / "elsewhere").rename(out / ADAPTER)
    shard = shard_with(out, tensor_of(out, 3))
    shard.unlink()
    found = problems(base, out)
    assert found[shard.name] == "is missing"
    assert found[NAME] == f"cannot be checked without {shard.name}"


def test_force_replaces_a_result_with_stacks(copies: tuple[Path, Path]) -> None:
    """The files of a copy are newer than the manifest, and are hashed before they are replaced."""
    base, out = copies
    tensor = tensor_of(out, 7)
    (out / "pissa_manifest.json").touch()
    for path in out.rglob("*.safetensors"):
        path.touch()
    options: dict[str, Any] = {"rank": 4, "target_parameters": BOTH, "progress": False}
    pk.init_checkpoint(base, out, force=True, seed=1, **options)
    assert not problems(base, out)
    shard = shard_with(out, tensor)
    flip(shard, 8 * (shard.stat().st_size - 1))
    with pytest.raises(FileExistsError, match=r"which has changed since init wrote it"):
        pk.init_checkpoint(base, out, force=True, seed=2, **options)
