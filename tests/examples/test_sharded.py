"""The example of sharded models, in two processes: FSDP2 and DeepSpeed ZeRO-3 after get_peft_model."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import pissa_kernels as pk
from pissa_kernels.examples import sharded

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(sharded.__file__).parent / "configs"
NEEDED = {"fsdp2": {"accelerate"}, "zero3": {"accelerate", "deepspeed"}}
FIGURES = {
    "initialized, sharded": "the base model, in every process",
    "trained for 6 steps": "the base model;",
    "original_model": "the base model, in every process",
    "loaded in one process": "the trained model",
    "converted to a plain LoRA": "the trained model",
}


def launch(config: str, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the example in two processes, on CPUs."""
    command = [
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / f"{config}.yaml"),
        "--main_process_port",
        "0",
    ]
    script = ["-m", "pissa_kernels.examples.sharded", "--output", str(out), *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command, *script],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the launched processes: the order of sums may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def needs(config: str) -> None:
    if missing := sorted(name for name in NEEDED[config] if importlib.util.find_spec(name) is None):
        pytest.skip(f"needs {' and '.join(missing)}")


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(NEEDED))
def test_the_usual_order(config: str, tmp_path: Path) -> None:
    needs(config)
    done = launch(config, tmp_path, "--steps", "6", "--rank", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout
    figures = {}
    for what, of in FIGURES.items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(what)]
        found = re.fullmatch(rf"{what} +(\S+) from {re.escape(of)}.*", line)
        assert found, line
        figures[what] = float(found[1])
    allowed = 8 * 2.0**-24 * math.sqrt(21)
    assert figures["loaded in one process"] == 0
    assert figures.pop("trained for 6 steps") > 1e-2
    assert all(figure <= allowed for figure in figures.values())
    first, last = map(float, re.search(r"loss (\S+) at the first step, (\S+) at the last", done.stdout).groups())  # type: ignore[union-attr]
    assert last < first - 0.1

    # what the first process has written is what one process computes from the model by itself
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    settings = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules="all-linear")
    with pk.patch_peft():
        alone = peft.get_peft_model(base, settings)
    initial = load_file(tmp_path / "adapter" / "pissa_initial.safetensors")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    factors = {
        name.replace(".default", ""): parameter for name, parameter in alone.named_parameters() if "lora_" in name
    }
    assert len(factors) == 42
    for name, factor in factors.items():
        assert torch.equal(initial[name], factor), name
        assert trained[name].shape == factor.shape
        assert not torch.equal(trained[name], factor), name


def test_figures_above_what_rounding_explains_do_not_hold() -> None:
    figures = dict.fromkeys(("initialized", "original", "reloaded", "converted"), 1e-7)
    right = sharded.Result(**figures, losses=[2.0, 1.0], trained=0.5, allowed=1e-6)
    assert right.holds
    assert "rounding" not in sharded.lines(right)
    for name in figures:
        for value in (1e-5, math.nan):
            wrong = sharded.Result(**{**figures, name: value}, losses=[2.0, 1.0], trained=0.5, allowed=1e-6)
            assert not wrong.holds
            assert sharded.lines(wrong).endswith("above 1.0e-06, which is what rounding explains")


def test_without_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "file").touch()
    for folder, message in ((tmp_path, "is not an empty folder"), (tmp_path / "new", "started by accelerate launch")):
        with pytest.raises(SystemExit) as stopped:
            sharded.main(["--output", str(folder)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
