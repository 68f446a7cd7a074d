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
# These load a model from the hub before they come to PiSSA.
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
    # the distribution leaves it out, but the tests import each other relatively
    (folder / "tests" / "__init__.py").touch()
    return folder


@pytest.mark.slow
def test_pefts_own_tests_pass_with_ours_in_place(source: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'tests' / 'support'}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_initialization.py", "-q", "-k", f"pissa and {NEEDS_HUB}",
         "-o", "addopts=", "-p", "no:cacheprovider", "-p", "upstream_hook"],
        cwd=source, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    initialised = re.search(r"pissa_kernels initialised (\d+) layers", run.stdout)
    assert passed is not None
    assert initialised is not None
    assert int(passed[1]) >= 28, "PEFT has fewer PiSSA tests than it had: look at what went"
    # what stock PEFT 0.21 calls its own pissa_init for in them
    assert int(initialised[1]) >= 12, "the hook was not what they tested"
