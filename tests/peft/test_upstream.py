"""PEFT's own PiSSA tests, from its source distribution, with the hook in place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import peft
import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
# Tests that load a model from the hub before they use PiSSA.
NEEDS_HUB = "not test_load_pissa_olora_with_other_adapter_warns"

# The others of TestLoftQ compare real models of the hub, and LoftQ computes on a GPU only.
CONFIGURATION = "test_config"


@pytest.fixture(scope="module")
def source() -> Path:
    folder = CACHE / f"peft-{peft.__version__}"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        fetched = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", CACHE,
             f"peft=={peft.__version__}"],
            capture_output=True, text=True,
        )  # fmt: skip
        archive = CACHE / f"{folder.name}.tar.gz"
        if fetched.returncode or not archive.is_file():
            pytest.skip(f"PEFT's source distribution could not be fetched: {fetched.stderr.strip()[-200:]}")
        with tarfile.open(archive) as tar:
            tar.extractall(CACHE, filter="data")
    # missing in the distribution, although the tests use relative imports
    (folder / "tests" / "__init__.py").touch()
    return folder


def run_upstream(source: Path, cwd: Path, *arguments: str) -> tuple[int, int]:
    """The number of PEFT's tests that pass, none may fail; and of the layers that the hook has initialized."""
    path = os.pathsep.join(map(str, (source, ROOT / "tests" / "support", ROOT)))  # "tests" is PEFT's
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments, "-c", source / "pyproject.toml", "--rootdir", source,
         "-o", "addopts=", "-p", "no:cacheprovider", "-p", "upstream_hook"],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    initialized = re.search(r"pissa_kernels initialized (\d+) layers", run.stdout)
    assert passed is not None
    assert initialized is not None
    return int(passed[1]), int(initialized[1])


@pytest.mark.slow
def test_pefts_own_tests_pass_under_the_hook(source: Path) -> None:
    passed, initialized = run_upstream(source, source, "tests/test_initialization.py", "-k", f"pissa and {NEEDS_HUB}")
    assert passed >= 28, "PEFT has fewer PiSSA tests than before: check which are missing"
    # the number of calls of pissa_init in these tests with stock PEFT 0.21
    assert initialized >= 12, "the tests did not run the hook"


@pytest.mark.slow
def test_pefts_own_tests_of_quantized_models_pass_under_the_hook(source: Path, tmp_path: Path) -> None:
    """TestPiSSA quantizes the weights of a model, or those that PiSSA leaves, and compares the errors."""
    pytest.importorskip("bitsandbytes", reason="PEFT's tests quantize with bitsandbytes, which is not installed")
    tests = source / "tests" / "test_gpu_examples.py"
    passed, initialized = run_upstream(
        source, tmp_path, f"{tests}::TestPiSSA", f"{tests}::TestLoftQ",
        "-k", f"(TestPiSSA and not cpu1) or {CONFIGURATION}",  # their two devices are one here
        "-p", "upstream_quantized", "-W", "ignore:`is_gradient_checkpointing` is deprecated",
    )  # fmt: skip
    assert passed >= 9, "PEFT has fewer quantized PiSSA tests than before: check which are missing"
    assert initialized >= 89, "the tests did not run the hook"
