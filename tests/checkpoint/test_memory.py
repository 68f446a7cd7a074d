"""Peak memory of a run: a small multiple of the largest weight, whatever the number of weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..support.models import build

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
LARGEST = 2 * 1024 * 1024
# Prints the peak of resident memory in bytes after the imports, after the plan and at the end.
MEASURED = """
import json, re, sys
from pathlib import Path
import peft, torch, transformers.models.llama.modeling_llama
from pissa_kernels.checkpoint.run import run_job
from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.options import AdapterOptions

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

imported = peak()
model, out, options = Path(sys.argv[1]), Path(sys.argv[2]), AdapterOptions(rank=8)
job = plan_checkpoint(model, out, options)
planned = peak()
report = run_job(job, workers=2, progress=False)
print(json.dumps([imported, planned, peak(), len(report.layers)]))
"""


def many(folder: Path, layers: int) -> Path:
    """Save a model with seven targets of 1024×1024 per layer."""
    import transformers

    config = build("llama").config
    config.update({
        "hidden_size": 1024, "intermediate_size": 1024, "num_key_value_heads": 4, "num_hidden_layers": layers,
        "head_dim": 256,
    })  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.03, generator=generator)
    model.save_pretrained(folder, max_shard_size="20MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_memory_does_not_grow_with_the_number_of_weights(tmp_path: Path) -> None:
    found = []
    for layers in (3, 6):
        model = many(tmp_path / str(layers), layers)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, model, tmp_path / f"out-{layers}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        imported, planned, finished, targets = json.loads(done.stdout)
        assert targets == 7 * layers
        assert finished - imported <= 4 * LARGEST + 100 * MIB
        found.append(finished - planned)
    assert found[1] <= found[0] + 21 * LARGEST / 2, "half of what twice as many weights would add"
