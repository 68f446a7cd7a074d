"""Checkpoint folders for tests, and their contents before and after a run. Nothing here calls the package."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .models import build

ADAPTER = "pissa_init/adapter_model.safetensors"
REPORT = "pissa_init/pissa_report.json"
# Files of a result that its source does not have.
ADDED = {
    "pissa_manifest.json",
    ADAPTER,
    "pissa_init/adapter_config.json",
    REPORT,
    f"{REPORT}.sha256",
}


def save(model: Any, folder: Path, shard: str = "100KB") -> Path:
    """Save a model with transformers, and beside it a tokenizer, code in a subfolder, and weights in another format."""
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"vocab": {"é": 0}}}\n', encoding="utf-8")
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("raise RuntimeError('this must not run')\n")
    torch.save({"weight": torch.ones(3)}, folder / "pytorch_model.bin")
    return folder


def small(folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "20KB") -> Path:
    """Save a model of seven targets and five other tensors in several shards. A run on it takes a tenth of a second."""
    return save(build("llama", dtype, width=32, layers=1), folder, shard)


def tied_llama(dtype: torch.dtype = torch.float32) -> Any:
    """A Llama whose lm_head is tied to its embedding."""
    import transformers

    config = build("llama", dtype).config
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files in a folder, as the safetensors package reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def factors(out: Path, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one layer, as stored."""
    with safe_open(out / ADAPTER, framework="pt") as file:
        A, B = (file.get_tensor(f"base_model.model.{layer}.lora_{factor}.weight") for factor in "AB")
    return A, B


def layers(out: Path) -> list[dict[str, Any]]:
    """The layers of a result's report, whose hash is checked."""
    content = (out / REPORT).read_bytes()
    assert (out / f"{REPORT}.sha256").read_text() == f"{hashlib.sha256(content).hexdigest()}  pissa_report.json\n"
    found: list[dict[str, Any]] = json.loads(content)["layers"]
    return found


def header(path: Path) -> bytes:
    """The bytes of a safetensors file before its first tensor: the length and the JSON."""
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Contents of every file below a folder, hidden ones included; None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def untimed(folder: Path) -> dict[str, Any]:
    """Contents of every file below a folder; of reports, whose hash is checked, without the times."""
    found: dict[str, Any] = contents(folder)
    for name in [name for name in found if name.endswith(REPORT)]:
        out = folder / name.removesuffix(REPORT)
        found[name] = [
            {**layer, "seconds": None, "parts": [{**part, "seconds": None} for part in layer.get("parts", ())]}
            for layer in layers(out)
        ]
        found[f"{name}.sha256"] = None
    return found


def witness(folder: Path) -> dict[str, tuple[int, str | None, bytes | None]]:
    """Time of modification, target of a symbolic link, and contents of everything below a folder, to detect changes."""
    found = {}
    for name, content in contents(folder).items():
        path = folder / name
        found[name] = (path.lstat().st_mtime_ns, os.readlink(path) if path.is_symlink() else None, content)
    return found
