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


@pytest.mark.slow
def test_pefts_own_tests_pass_under_the_hook(source: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'tests' / 'support'}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_initialization.py", "-q", "-k", f"pissa and {NEEDS_HUB}",
         "-o", "addopts=", "-p", "no:cacheprovider", "-p", "upstream_hook"],
        cwd=source, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    initialized = re.search(r"pissa_kernels initialized (\d+) layers", run.stdout)
    assert passed is not None
    assert initialized is not None
    assert int(passed[1]) >= 28, "PEFT has fewer PiSSA tests than before: check which are missing"
    # the number of calls of pissa_init in these tests with stock PEFT 0.21
    assert int(initialized[1]) >= 12, "the tests did not run the hook"
