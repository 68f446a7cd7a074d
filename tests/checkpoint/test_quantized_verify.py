"""verify_checkpoint on quantized results: one flipped bit is found and named, and so is what no hash tells."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.checkpoint.manifest import MANIFEST, Manifest
from pissa_kernels.files.header import bytes_of, read_header, sha256

from ..support.checkpoints import save, tensors
from ..support.models import build

QUERY, KEY, VALUE = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
A_QUERY = f"base_model.model.{QUERY.removesuffix('.weight')}.lora_A.weight"
FLIPS = 60
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("verify")
    base, out = save(build("llama", torch.bfloat16, width=64, layers=1), root / "base"), root / "out"
    pk.init_checkpoint(
        base, out, rank=4, target_modules=["q_proj", "lm_head"], quantize="nf4", double_quant=True, progress=False
    )
    return base, out


@pytest.fixture
def copies(folders: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "base", tmp_path / "out"


def problems(base: Path, out: Path) -> dict[str, str]:
    return dict(pk.verify_checkpoint(base, out, workers=1, progress=False))


def test_result_holds(folders: tuple[Path, Path]) -> None:
    found = pk.verify_checkpoint(*folders, progress=False)
    assert not found
    assert [layer.name for layer in found.layers] == ["lm_head"]
    assert [layer.adapted for layer in found.quantized] == [True] + [False] * 6
    assert all(layer.apart == 0 for layer in found.quantized)
    before = tensors(folders[0])
    assert len(found.layers) + len(found.quantized) + found.copied == len(before)
    others = [path for path in folders[1].rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert found.files == len(others) - 1, "all but the manifest"


def tensor_at(out: Path, key: str) -> tuple[Path, int, int]:
    """File and place of a tensor of a result."""
    for path in out.rglob("*.safetensors"):
        if info := read_header(path).tensors.get(key):
            return path, info.start, info.nbytes
    raise KeyError(key)


@pytest.mark.parametrize(
    ("key", "where"),
    [
        (QUERY, QUERY),
        (f"{QUERY}.absmax", QUERY),
        (f"{QUERY}.nested_absmax", QUERY),
        (f"{QUERY}.nested_quant_map", QUERY),
        (f"{QUERY}.quant_map", QUERY),
        (f"{QUERY}.quant_state.bitsandbytes__nf4", QUERY),
        (KEY, KEY),
        (f"{KEY}.absmax", KEY),
        (f"{KEY}.quant_state.bitsandbytes__nf4", KEY),
        (A_QUERY, QUERY),
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
@pytest.mark.parametrize("place", [0.0, 0.4])
def test_flipped_bit_of_a_tensor(key: str, where: str, place: float, copies: tuple[Path, Path]) -> None:
    path, start, nbytes = tensor_at(copies[1], key)
    content = bytearray(path.read_bytes())
    content[start + int(place * nbytes)] ^= 1
    path.write_bytes(content)
    found = problems(*copies)
    assert list(found) == [where]
    whose = "its" if key == where else f"{key}'s"
    assert f"{whose} bytes are not those that were written" in found[where]


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_flipped_bit_of_a_file(name: str, copies: tuple[Path, Path]) -> None:
    content = bytearray((copies[1] / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copies[1] / name).write_bytes(content)
    assert problems(*copies) == {name: "its bytes are not those that were written"}


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_file_of_another_original(name: str, copies: tuple[Path, Path]) -> None:
    record = json.loads((copies[0] / name).read_text())
    (record if name == "config.json" else record["metadata"])["note"] = "changed"
    (copies[0] / name).write_text(json.dumps(record))
    assert problems(*copies) == {
        name: f"is not the file in {copies[0]} with the entries of the quantization",
    }


@pytest.mark.parametrize("what", ["length", "name"])
def test_damaged_header(what: str, copies: tuple[Path, Path]) -> None:
    """The shard is named, and nothing else: its tensors have places that no other header tells."""
    path, _, _ = tensor_at(copies[1], QUERY)
    content = bytearray(path.read_bytes())
    at = 0 if what == "length" else content.index(b"q_proj")
    content[at] ^= 1
    path.write_bytes(content)
    assert list(problems(*copies)) == [path.name]


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
        path = files[number % len(files)]
        content = path.read_bytes()
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        assert refused(base, out), path
        path.write_bytes(content)
    assert not problems(base, out)


def test_other_original(copies: tuple[Path, Path]) -> None:
    """Weights of another model, and of other shapes."""
    base, out = copies
    shutil.rmtree(base)
    model = build("llama", torch.bfloat16, width=64, layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.01)
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    save(model, base)
    found = problems(base, out)
    assert found.keys() >= {KEY, QUERY}
    assert "bytes are not those of Q(W)" in found[KEY]
    assert "bytes are not those of Q(W − s·B·A)" in found[QUERY]
    shutil.rmtree(base)
    save(build("llama", torch.bfloat16, width=32, layers=1), base)
    assert problems(base, out).keys() >= {KEY, QUERY}


def forge(out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change tensors of a result, and the manifest with them, as a run would have written it."""
    found = tensors(out) | tensors(out / "pissa_init")
    changed = {key: value.clone() for key, value in change(found).items()}  # before the files under them change
    manifest = Manifest.read(out)
    files = json.loads(json.dumps(dict(manifest.files)))
    for key, value in changed.items():
        path, start, nbytes = tensor_at(out, key)
        content = bytearray(path.read_bytes())
        content[start : start + nbytes] = bytes_of(value.contiguous())
        path.write_bytes(content)
        files[path.relative_to(out).as_posix()]["tensors"][key] = sha256(bytes_of(value.contiguous()))
    replace(manifest, files=files).write(out)


def test_codes_of_another_layer(copies: tuple[Path, Path]) -> None:
    """With right hashes: the codes and scales of k and v are exchanged."""

    def exchange(found: dict[str, Tensor]) -> dict[str, Tensor]:
        keys = [key for key in found if key == KEY or key.startswith(f"{KEY}.")]
        other = {key: key.replace("k_proj", "v_proj") for key in keys}
        return {key: found[other[key]] for key in keys} | {other[key]: found[key] for key in keys}

    forge(copies[1], exchange)
    found = problems(*copies)
    assert found.keys() == {KEY, VALUE}
    assert all("bytes are not those of Q(W)" in what for what in found.values())


def test_other_factors(copies: tuple[Path, Path]) -> None:
    forge(copies[1], lambda found: {A_QUERY: found[A_QUERY] * 2})
    found = problems(*copies)
    assert list(found) == [QUERY]
    for words in ("are not those of Q(W − s·B·A)", "the error is", "are not the singular values in the report"):
        assert words in found[QUERY]


@pytest.mark.parametrize("change", ["shape", "blocksize", "nested_blocksize", "dtype", "quant_type", "not JSON"])
def test_damaged_state(change: str, copies: tuple[Path, Path]) -> None:
    """bitsandbytes is not asked for the values of a state that does not belong to the codes: it reads beyond them."""
    key = f"{KEY}.quant_state.bitsandbytes__nf4"

    others = {"shape": [4096, 4096], "blocksize": 2, "nested_blocksize": 1, "dtype": "float16", "quant_type": "fp4"}

    def damage(found: dict[str, Tensor]) -> dict[str, Tensor]:
        state = json.loads(bytes(found[key].tolist()))
        assert state.keys() >= others.keys()
        text = json.dumps(state | ({change: others[change]} if change in others else {}), separators=(",", ":"))
        data = b"\xff" * 256 if change == "not JSON" else text.ljust(256).encode()
        return {key: torch.frombuffer(bytearray(data), dtype=torch.uint8)}

    forge(copies[1], damage)
    found = problems(*copies)
    assert list(found) == [KEY]
    assert "quantization state is damaged" in found[KEY] or "quant_state.bitsandbytes__nf4 says" in found[KEY]
