"""Checkpoint folders as users have them, and what a run makes of them. Nothing here calls the package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .models import build

ADAPTER = "pissa_init/adapter_model.safetensors"
REPORT = "pissa_init/pissa_report.json"
# The manifest of the result is its own; these say what the source did not.
ADDED = {
    "pissa_manifest.json",
    ADAPTER,
    "pissa_init/adapter_config.json",
    REPORT,
    f"{REPORT}.sha256",
}


def save(model: Any, folder: Path, shard: str = "100KB") -> Path:
    """A model as transformers saves it, beside it a tokenizer, code in a subfolder, and its weights once more."""
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"vocab": {"é": 0}}}\n', encoding="utf-8")
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("raise RuntimeError('nobody runs this')\n")
    torch.save({"weight": torch.ones(3)}, folder / "pytorch_model.bin")
    return folder


def small(folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "20KB") -> Path:
    """Seven targets and some copies over several shards; a run on it takes a tenth of a second."""
    return save(build("llama", dtype, width=32, layers=1), folder, shard)


def tied_llama(dtype: torch.dtype = torch.float32) -> Any:
    """A Llama whose head is its embedding."""
    import transformers

    config = build("llama", dtype).config
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's own safetensors files, as the format's package reads them."""
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
    """The layers of a result's report; the report's digest must hold."""
    content = (out / REPORT).read_bytes()
    assert (out / f"{REPORT}.sha256").read_text() == f"{hashlib.sha256(content).hexdigest()}  pissa_report.json\n"
    found: list[dict[str, Any]] = json.loads(content)["layers"]
    return found


def header(path: Path) -> bytes:
    """The length and the JSON before a safetensors file's first tensor."""
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, hidden ones included, and every folder with None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def untimed(folder: Path) -> dict[str, Any]:
    """Every file below a folder, of reports what does not depend on the clock; a report's digest must hold."""
    found: dict[str, Any] = contents(folder)
    for name in [name for name in found if name.endswith(REPORT)]:
        out = folder / name.removesuffix(REPORT)
        found[name] = [{**layer, "seconds": None} for layer in layers(out)]
        found[f"{name}.sha256"] = None
    return found


def witness(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """What changes when anything below a folder is touched: contents, and times of modification."""
    return {name: ((folder / name).stat().st_mtime_ns, content) for name, content in contents(folder).items()}
