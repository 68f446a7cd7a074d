"""verify_checkpoint: a result passes as it was written, and no other."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pissa_kernels.checkpoint import worker as worker_module
from pissa_kernels.checkpoint.manifest import MANIFEST, Manifest
from pissa_kernels.checkpoint.options import AdapterOptions
from pissa_kernels.checkpoint.plan import ADAPTER_WEIGHTS, plan_checkpoint
from pissa_kernels.checkpoint.run import run_job
from pissa_kernels.checkpoint.verify import verify_checkpoint
from pissa_kernels.files import header
from pissa_kernels.files.header import read_header

from ..support.models import build

FLIPS = 300
NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded bfloat16 checkpoint with another file, and the result of init."""
    root = tmp_path_factory.mktemp("verify")
    build("llama", torch.bfloat16, width=32, layers=1).save_pretrained(root / "base", max_shard_size="20KB")
    (root / "base" / "notes.txt").write_text("copied\n")
    run_job(plan_checkpoint(root / "base", root / "out", AdapterOptions(rank=4)), progress=False)
    return root / "base", root / "out"


@pytest.fixture
def copies(folders: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "base", tmp_path / "out"


def problems(base: Path, out: Path) -> dict[str, str]:
    return dict(verify_checkpoint(base, out, workers=1, progress=False))


def test_result_of_init_holds(folders: tuple[Path, Path]) -> None:
    found = verify_checkpoint(*folders, progress=False)
    assert not found
    assert len(found.layers) == 7
    assert len(found.layers) + found.copied == sum(
        len(read_header(path).tensors) for path in folders[0].glob("*.safetensors")
    )
    assert all(0.5 < layer.reconstruction <= 1 for layer in found.layers)  # bfloat16 rounds


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.float32), ("mistral", torch.float16)])
def test_other_architectures_and_dtypes_hold(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(name, dtype, width=32, layers=1).save_pretrained(tmp_path / "base")
    options = AdapterOptions(rank=4, alpha=9, use_rslora=True)
    run_job(plan_checkpoint(tmp_path / "base", tmp_path / "out", options), progress=False)
    assert not verify_checkpoint(tmp_path / "base", tmp_path / "out", progress=False)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def refused(base: Path, out: Path) -> bool:
    try:
        return bool(problems(base, out))
    except ValueError as error:
        return MANIFEST in str(error)  # without a manifest nothing can be checked


def test_any_flipped_bit_is_found(copies: tuple[Path, Path]) -> None:
    base, out = copies
    files = sorted(path for path in out.rglob("*") if path.is_file())
    generator = random.Random(0)
    for number in range(FLIPS):
        # a random bit of each file in turn
        path = files[number % len(files)]
        bit = generator.randrange(8 * path.stat().st_size)
        flip(path, bit)
        assert refused(base, out), (path, bit)
        flip(path, bit)
    assert not problems(base, out)


def test_hashes_cover_every_chunk(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are read and written in many chunks, against hashlib."""
    monkeypatch.setattr(header, "CHUNK_BYTES", 48)
    monkeypatch.setattr(worker_module, "CACHED_BYTES", 48)
    base, out = folders[0], tmp_path / "out"
    job = plan_checkpoint(base, out, AdapterOptions(rank=4))
    run_job(job, progress=False)
    files = Manifest.read(out).files
    for path in out.rglob("*.safetensors"):
        found = {
            name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in load_file(path).items()
        }
        assert files[path.relative_to(out).as_posix()]["tensors"] == found
    shard = next(path for path in out.glob("*.safetensors") if NORM in read_header(path).tensors)
    info = read_header(shard).tensors[NORM]
    edge = info.start // 48 * 48 + 48  # chunks end at multiples of their size
    assert info.start < edge - 1 < edge < info.stop
    for byte in (info.start, edge - 1, edge, info.stop - 1):
        flip(shard, 8 * byte)
        assert problems(base, out) == {NORM: "its bytes are not those that were written"}
        flip(shard, 8 * byte)
    with worker_module.Worker(job, out, torch.device("cpu")) as worker:
        hashes = {name: sha256 for file in files.values() for name, sha256 in file.get("tensors", {}).items()}
        for tensor in job.tensors:
            record = {"shard": tensor.shard, "tensor": tensor.info.name, "sha256": hashes[tensor.info.name]}
            assert worker.holds(tensor, record)
            assert not worker.holds(tensor, {**record, "sha256": hashes[QUERY if tensor.info.name != QUERY else NORM]})


def test_only_the_damaged_tensor_is_named(copies: tuple[Path, Path]) -> None:
    base, out = copies
    for tensor in (NORM, QUERY):
        shard = next(path for path in out.glob("*.safetensors") if tensor in read_header(path).tensors)
        place = 8 * read_header(shard).tensors[tensor].start
        flip(shard, place)
        assert problems(base, out) == {tensor: "its bytes are not those that were written"}
        flip(shard, place)
    A = "base_model.model." + QUERY.replace(".weight", ".lora_A.weight")
    flip(out / ADAPTER_WEIGHTS, 8 * read_header(out / ADAPTER_WEIGHTS).tensors[A].start)
    [(tensor, what)] = problems(base, out).items()
    assert tensor == QUERY
    assert A in what


def rewrite(folder: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a tensor and its hash in the manifest, as if init had written it."""
    path = next(path for path in folder.rglob("*.safetensors") if tensor in read_header(path).tensors)
    changed = change(load_file(path)[tensor]).contiguous().view(torch.uint8).numpy().tobytes()
    with path.open("r+b") as file:
        file.seek(read_header(path).tensors[tensor].start)
        file.write(changed)
    if not (folder / MANIFEST).is_file():
        return
    manifest = Manifest.read(folder)
    files = json.loads(json.dumps(dict(manifest.files)))
    files[path.relative_to(folder).as_posix()]["tensors"][tensor] = hashlib.sha256(changed).hexdigest()
    Manifest(manifest.plan, files, manifest.targets).write(folder)


@pytest.mark.parametrize(
    ("tensor", "change", "expected"),
    [
        (QUERY, lambda residual: residual * 1.05, "W_res"),
        (QUERY, lambda residual: residual * torch.nan, "W_res"),
        ("A", lambda factor: factor.flip(0), "W_res"),
        ("A", lambda factor: 1.1 * factor, "singular values"),
        (NORM, lambda norm: norm * 2, "differs from the tensor"),
    ],
    ids=["residual", "nan", "order", "scale", "copy"],
)
def test_values_are_checked_beside_hashes(
    copies: tuple[Path, Path], tensor: str, change: Callable[[torch.Tensor], torch.Tensor], expected: str
) -> None:
    base, out = copies
    key = "base_model.model." + QUERY.replace(".weight", ".lora_A.weight") if tensor == "A" else tensor
    rewrite(out, key, change)
    [(where, what)] = problems(base, out).items()
    assert where == (QUERY if tensor == "A" else tensor)
    assert expected in what


def test_factors_that_are_not_triplets_are_found(copies: tuple[Path, Path]) -> None:
    """A column of the right norm in another direction."""
    base, out = copies
    name = "base_model.model." + QUERY.removesuffix(".weight")
    factors = load_file(out / ADAPTER_WEIGHTS)
    B = factors[f"{name}.lora_B.weight"]
    changed = B.clone()
    changed[:, 0] = B[:, 0].flip(0)
    rewrite(out, f"{name}.lora_B.weight", lambda _: changed)
    what = problems(base, out)[QUERY]
    assert "residual of" in what


def test_changed_original_is_not_reported_as_damage(copies: tuple[Path, Path]) -> None:
    base, out = copies
    rewrite(base, NORM, lambda norm: norm * 2)
    (base / "notes.txt").write_text("changed\n")
    assert problems(base, out) == {
        NORM: f"differs from the tensor in {base}",
        "notes.txt": f"differs from the file in {base}",
    }


def test_missing_and_truncated_files(copies: tuple[Path, Path]) -> None:
    base, out = copies
    shards = sorted(out.glob("*.safetensors"))
    with shards[0].open("r+b") as file:
        file.truncate(shards[0].stat().st_size - 1)
    shards[1].unlink()
    (out / "notes.txt").unlink()
    found = problems(base, out)
    assert "truncated" in found[shards[0].name]
    assert found[shards[1].name] == "is missing"
    assert found["notes.txt"] == "is missing"


def test_added_file_is_listed(copies: tuple[Path, Path]) -> None:
    base, out = copies
    (out / "later.txt").write_text("added\n")
    found = verify_checkpoint(base, out, progress=False)
    assert not found
    assert found.extra == ["later.txt"]
