"""Install a wheel or an sdist into a new virtual environment without a compiler, and use it there.

    python tests/packages/check_install.py dist/pissa_kernels-*.whl csrc
    python tests/packages/check_install.py dist/pissa_kernels-*.tar.gz torch --torch "torch==2.10.*"

The second argument is the backend that must transpose CPU tensors. pip takes torch and the other
dependencies from where it is configured to.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Holds a decomposition against float64. The arguments are the backend that must be used and the folder of the package.
CHECK = """
import shutil, sys
from pathlib import Path

import torch
import pissa_kernels as pk

backend, folder = sys.argv[1:]
assert Path(folder) in Path(pk.__file__).parents, pk.__file__
assert not any(shutil.which(name) for name in ("cc", "c++", "gcc", "g++", "clang++")), "there is a compiler on the PATH"
found, reasons = (ask("transpose_cast", torch.ones(4, 3)) for ask in (pk.ops.backend, pk.ops.unsupported_reasons))
assert found == backend, f"transposes run in {found}, not in {backend}: {reasons}"
torch.manual_seed(0)
U, V = (torch.linalg.qr(torch.randn(n, 200, dtype=torch.float64))[0] for n in (300, 200))
S = torch.logspace(0, -3, 200, dtype=torch.float64)
weight = (U * S @ V.T).float()
result = pk.decompose(weight, 16)
basis = torch.linalg.qr(result.lora_A.double().T)[0]
deficit = 1 - (weight.double() @ basis).square().sum() / torch.linalg.svdvals(weight.double())[:16].square().sum()
assert -1e-12 < deficit <= 1e-6, f"the energy deficit is {deficit}"
assert result.certificate.converged
print(f"pissa_kernels {pk.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}: {found}")
"""


def check(python: Path | str, backend: str, folder: Path, environment: dict[str, str]) -> str:
    """Run CHECK with an interpreter that finds the package in ``folder``. Returns what it printed.

    Raises:
        SystemExit: If the check failed; with its error output.
    """
    done = subprocess.run(
        [str(python), "-c", CHECK, backend, str(folder)],
        cwd=folder,  # not the checkout, whose pissa_kernels would be imported
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{folder}: {done.stderr.strip()}")
    return done.stdout.strip()


def without_compiler(path: Path) -> dict[str, str]:
    """The environment with ``path`` as its only PATH, and without what would change the build or the backend."""
    dropped = ("CC", "CXX", "PYTHONPATH", "PISSA_KERNELS_BUILD", "PISSA_KERNELS_BACKEND")
    return {name: value for name, value in os.environ.items() if name not in dropped} | {"PATH": str(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("backend", choices=["csrc", "torch"])
    parser.add_argument("--torch", default="torch", metavar="REQUIREMENT")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        scripts = Path(folder).resolve() / "bin"
        environment = without_compiler(scripts)
        pip = [str(scripts / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, arguments.torch, str(arguments.archive.resolve())], env=environment, check=True)
        print(check(scripts / "python", arguments.backend, scripts.parent, environment))


if __name__ == "__main__":
    main()
