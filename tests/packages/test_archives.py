"""The sdist, and the wheel that is built from it. check_install.py does the same with real builds and environments."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from pissa_kernels.ops import csrc

from .check_install import check, without_compiler

ROOT = Path(__file__).parents[2]
LIBRARY = csrc.FOLDER / csrc.LIBRARIES["cpu"]
pytestmark = pytest.mark.slow
needs_library = pytest.mark.skipif(csrc._failure("cpu") is not None, reason=str(csrc._failure("cpu")))

# Files of the package that are neither Python nor compiled.
DATA = {
    "pissa_kernels/py.typed",
    "pissa_kernels/examples/configs/fsdp2.yaml",
    "pissa_kernels/examples/configs/zero3.yaml",
    "pissa_kernels/ops/triton/launch/default.json",
    "pissa_kernels/report/page.html.jinja",
}

# In place of a compiler, because compiling takes long: it reads what it should compile, and links the library that the
# checkout has.
COMPILER = f"""#!{sys.executable}
import shutil, sys
from pathlib import Path

arguments = sys.argv[1:]
target = arguments[arguments.index("-o") + 1]
if "-shared" in arguments:
    assert all(Path(name).is_file() for name in arguments if name.endswith(".o"))
    shutil.copy({str(LIBRARY)!r}, target)
else:
    shutil.copy(arguments[arguments.index("-c") + 1], target)
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "pissa_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    setup(folder, "sdist")
    (archive,) = folder.glob("dist/*.tar.gz")
    return archive


def setup(folder: Path, command: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PISSA_KERNELS_BUILD"} | variables
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(archive: Path, folder: Path) -> None:
    """Without a network and without the dependencies, which this interpreter has."""
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(archive)],
        env=without_compiler(folder),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_sdist_has_all_that_a_build_reads(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert expected | DATA | {"setup.py", "pyproject.toml"} <= names
    assert not any(name.endswith(".so") for name in names)


def test_the_sdist_installs_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    install(sdist, tmp_path)
    (tags,) = tmp_path.glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: true\nTag: py3-none-any\n" in tags.read_text()
    assert check(sys.executable, "torch", tmp_path, without_compiler(tmp_path)).endswith("torch")


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
@pytest.mark.skipif(platform.system() != "Linux", reason="symbols have versions on Linux")
def test_the_library_names_the_versions_of_libstdcxx_that_it_needs() -> None:
    """Otherwise auditwheel cannot tell the platforms that the library runs on."""
    done = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    standard = [name for name in done.stdout.split() if re.match("_ZN?K?S", name)]
    assert standard
    assert all("@GLIBCXX" in name for name in standard), standard


@needs_library
def test_a_wheel_from_the_sdist_has_the_library_for_every_python(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    assert "csrc for cpu: will be built" in setup(folder, "bdist_wheel", PISSA_KERNELS_BUILD="cpu", CXX=str(compiler))
    (wheel,) = folder.glob("dist/*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in names if name.endswith(".so")] == ["pissa_kernels/ops/_csrc_cpu.so"]
    assert not any(name.startswith(("csrc/", "tests/", "bench/")) for name in names)
    assert set(names) >= DATA
    install(wheel, tmp_path / "installed")
    assert check(sys.executable, "csrc", tmp_path / "installed", without_compiler(tmp_path)).endswith("csrc")
