"""csrc as torch operators: registration, tracing, the library file and its build."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pissa_kernels as pk
from pissa_kernels.ops import csrc, dispatch

ROOT = Path(__file__).parents[2]
REASON = csrc._failure("cpu")
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(dtype: torch.dtype, transposed: bool) -> None:
    W = torch.randn(20, 30).to(dtype)
    W = W.mT if transposed else W
    m, n = W.shape
    ops = torch.ops.pissa_kernels
    torch.library.opcheck(ops.transpose_cast, (W, torch.bfloat16))
    for weight, leading in ((W, ()), (torch.stack([W.mT, W.mT]).mT, (2,))):
        torch.library.opcheck(ops.matmul, (weight, torch.randn(*leading, n, 3)))
        torch.library.opcheck(ops.rmatmul, (weight, torch.randn(*leading, m, 3)))
        torch.library.opcheck(ops.normal, (weight, torch.randn(*leading, n, 3)))
    torch.library.opcheck(ops.sum_of_squares, (W[None],))
    torch.library.opcheck(
        ops.orthonormalize, (torch.randn(n, 3), torch.linalg.qr(torch.randn(n, 4))[0].mT.contiguous())
    )
    torch.library.opcheck(ops.chebyshev_filter, (W, torch.randn(n, 3), torch.randn(n, 3), 2.0, 3))
    torch.library.opcheck(ops.ritz, (W, torch.randn(n, 3), 2))
    torch.library.opcheck(ops.triplets, (W, torch.randn(n, 3), 2))
    torch.library.opcheck(ops.triplets, (W, torch.randn(n, 3), 2, torch.randn(m, 3)))
    torch.library.opcheck(ops.chebyshev, (W, None, torch.randn(m, 12), 2, 1e-6, 20))
    torch.library.opcheck(ops.chebyshev, (W, torch.eye(n), torch.randn(n, 12), 2, 1e-6, 20))
    for image in (None, torch.zeros(12, m)):
        panel, empty = torch.linalg.qr(torch.randn(n, 4))[0], torch.zeros(0, 4)
        torch.library.opcheck(ops.lanczos, (W, panel, empty, torch.zeros(12, n), image, torch.zeros(12, 12), 0, 2))
    torch.library.opcheck(
        ops.quantize_blocks, (torch.randn(74), 32, torch.linspace(-1, 1, 15), torch.arange(16).byte())
    )
    torch.library.opcheck(ops.subtract_lowrank_, (W.clone(), torch.randn(m, 3), torch.randn(3, n), 0.5))
    torch.library.opcheck(ops.subtract_lowrank_, (W.clone(), torch.randn(n, 3), torch.randn(3, m), 0.5, True))


@needs_library
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(4, 8), 32, torch.ones(15), torch.ones(16).byte()), "contiguous vector of float32"),
        ((torch.ones(64)[::2], 32, torch.ones(15), torch.ones(16).byte()), "contiguous vector of float32"),
        ((torch.ones(64).half(), 32, torch.ones(15), torch.ones(16).byte()), "contiguous vector of float32"),
        ((torch.ones(64), 32, torch.ones(14), torch.ones(16).byte()), "expected 15 midpoints"),
        ((torch.ones(64), 32, torch.ones(15), torch.ones(16)), "expected 16 codes in uint8"),
        ((torch.ones(64), 48, torch.ones(15), torch.ones(16).byte()), "blocks of a multiple of 32"),
        ((torch.ones(63), 32, torch.ones(15), torch.ones(16).byte()), "an even number of values"),
    ],
)
def test_quantize_blocks_refuses(arguments: tuple[torch.Tensor, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pissa_kernels.quantize_blocks(*arguments)


@needs_library
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(4, 3), torch.ones(5, 2), torch.ones(2, 3), 1.0), "expected a float32 matrix of 4 rows"),
        ((torch.ones(4, 3), torch.ones(4, 2), torch.ones(2, 4), 1.0), "expected a float32 matrix of 2 rows"),
        ((torch.ones(4, 3), torch.ones(4, 2), torch.ones(2), 1.0), "A must be 2-D"),
        ((torch.ones(4, 3), torch.ones(4, 2).half(), torch.ones(2, 3), 1.0), "expected a float32 matrix"),
        ((torch.ones(4, 3).double(), torch.ones(4, 2), torch.ones(2, 3), 1.0), "must be float32, float16 or bfloat16"),
        ((torch.ones(8, 6)[::2, ::2], torch.ones(4, 2), torch.ones(2, 3), 1.0), "must be contiguous"),
    ],
)
def test_the_operator_refuses_what_it_would_read_out_of_bounds(arguments, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pissa_kernels.subtract_lowrank_(*arguments)


@needs_library
@pytest.mark.parametrize(
    ("weight", "panel", "words"),
    [
        (torch.ones(4, 3), torch.ones(4, 2), "a float32 panel of 3 rows"),
        (torch.ones(4, 3), torch.ones(3, 2).double(), "must be float32, float16 or bfloat16"),
        (torch.ones(4, 3), torch.ones(3, 2).half(), "a float32 panel"),
        (torch.ones(4, 3), torch.ones(3), "a float32 panel"),
        (torch.ones(2, 4, 3), torch.ones(3, 3, 2), "a float32 panel"),
        (torch.ones(4), torch.ones(4, 2), "must be 2-D"),
        (torch.ones(4, 3).double(), torch.ones(3, 2), "must be float32, float16 or bfloat16"),
        (torch.ones(8, 6)[::2, ::2], torch.ones(3, 2), "must be contiguous"),
    ],
)
def test_products_refuse_what_they_would_read_out_of_bounds(
    weight: torch.Tensor, panel: torch.Tensor, words: str
) -> None:
    for operator in (torch.ops.pissa_kernels.matmul, torch.ops.pissa_kernels.normal):
        with pytest.raises(RuntimeError, match=words):
            operator(weight, panel)


@pytest.mark.parametrize("backend", ["", "torch", "csrc"])
def test_verbs_under_torch_compile(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "csrc" and REASON is not None:
        pytest.skip(REASON)
    monkeypatch.setenv("PISSA_KERNELS_BACKEND", backend)

    def step(W: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        pk.ops.subtract_lowrank_(W, B, A, 0.5)
        return pk.ops.transpose_cast(W, torch.float32) + 1

    torch._dynamo.reset()
    W, B, A = torch.randn(20, 30).bfloat16(), torch.randn(20, 3), torch.randn(3, 30)
    eager, traced = W.clone(), W.clone()
    expected = step(eager, B, A)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(traced, B, A)
    assert torch.equal(eager, traced)
    assert torch.equal(expected, got)
    assert not torch.equal(W, traced)


@needs_library
@pytest.mark.parametrize("transposed", [False, True])
def test_products_under_torch_compile(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_KERNELS_BACKEND", "csrc")

    def step(W: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        Y, Z = pk.ops.normal(W, X)
        return pk.ops.rmatmul(W, pk.ops.matmul(W, Z) + Y)

    torch._dynamo.reset()
    W = torch.randn(20, 30).bfloat16()
    W, X = (W.mT, torch.randn(20, 3)) if transposed else (W, torch.randn(30, 3))
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(W, X), step(W, X))


def test_verbs_on_fake_tensors() -> None:
    with FakeTensorMode():
        W = torch.empty(20, 30, dtype=torch.bfloat16)
        assert pk.ops.transpose_cast(W, torch.float32).shape == (30, 20)
        assert pk.ops.subtract_lowrank_(W, torch.empty(20, 3), torch.empty(3, 30), 1.0) is W
        assert pk.ops.matmul(W, torch.empty(30, 4)).shape == (20, 4)
        assert pk.ops.rmatmul(W, torch.empty(20, 4)).shape == (30, 4)
        assert [product.shape for product in pk.ops.normal(W, torch.empty(30, 4))] == [(20, 4), (30, 4)]


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_the_library_links_against_the_stable_abi_alone() -> None:
    library = csrc.FOLDER / csrc.LIBRARIES["cpu"]
    done = subprocess.run(["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True)
    wanted = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    ours = [name for name in wanted if "torch" in name or "c10" in name or "at::" in name or name.startswith("Py")]
    assert ours
    assert all(re.fullmatch(r"(aoti_)?torch_\w+", name) for name in ours), ours


@needs_library
def test_every_instruction_set_was_built() -> None:
    if shutil.which("objdump") is None or os.uname().machine != "x86_64":
        pytest.skip("needs objdump and an x86 CPU")
    library = csrc.FOLDER / csrc.LIBRARIES["cpu"]
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert code.count("vfmadd") > 30
    assert "mulps  %xmm" in code


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 6), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
        ((10, 3), True),
        ((11, 0), True),  # by its PTX
        ((12, 1), True),
    ],
)
def test_a_device_needs_code_or_ptx(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch, no_cached_capability: None
) -> None:
    monkeypatch.setattr(csrc, "_FAILURES", {"cpu": None, "cuda": None})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    with FakeTensorMode():
        W = torch.empty(8, 8, device="cuda")
    reasons = pk.ops.unsupported_reasons("subtract_lowrank_", W)["csrc"]
    if runs:
        assert reasons == []
        assert pk.ops.backend("subtract_lowrank_", W) == "csrc"
    else:
        assert reasons == [
            "the device's compute capability is 7.5; the library has code for 8.0, 9.0, 10.0, 12.0 and PTX for 9.0"
        ]
        assert pk.ops.backend("subtract_lowrank_", W) == "torch"
        monkeypatch.setenv(dispatch.VARIABLE, "csrc")
        with pytest.raises(RuntimeError, match=r"csrc cannot run on a \(8, 8\) float32 weight on cuda:0: .* 7\.5"):
            pk.ops.backend("subtract_lowrank_", W)


def test_a_library_without_code_for_a_newer_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, no_cached_capability: None
) -> None:
    monkeypatch.setattr(csrc, "CUDA_CODE", ((8, 6),))
    monkeypatch.setattr(csrc, "CUDA_PTX", (12, 0))
    for capability, runs in (((8, 0), False), ((8, 9), True), ((9, 0), False), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        csrc._capability_reason.cache_clear()
        assert (csrc._capability_reason(0) is None) == runs, capability


@pytest.fixture
def no_cached_capability() -> Iterator[None]:
    cached = [csrc._capability_reason]
    if importlib.util.find_spec("triton"):
        from pissa_kernels.ops.triton import _device_reason

        cached.append(_device_reason)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_the_build_has_the_code_that_the_backend_expects() -> None:
    text = (ROOT / "setup.py").read_text()
    built = re.findall(r'"(\d+)"', re.search(r"CUDA_ARCHITECTURES = (.*)", text)[1])  # type: ignore[index]
    assert tuple(divmod(int(name), 10) for name in built) == csrc.CUDA_CODE
    assert divmod(int(re.search(r'CUDA_PTX = "(\d+)"', text)[1]), 10) == csrc.CUDA_PTX  # type: ignore[index]


def build(folder: Path, choice: str, **changes: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    (folder / "pissa_kernels" / "ops").mkdir(parents=True, exist_ok=True)
    # pyproject.toml reads the version from here; without the file it would be that of an installed package, if any
    shutil.copy(ROOT / "pissa_kernels" / "_version.py", folder / "pissa_kernels")
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | {"PISSA_KERNELS_BUILD": choice} | changes,
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_is_built_unless_requested(tmp_path: Path) -> None:
    done = build(tmp_path, "0")
    assert done.returncode == 0, done.stderr
    assert "csrc is not built" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_a_build_without_a_compiler_is_skipped_with_the_reason(tmp_path: Path) -> None:
    done = build(tmp_path, "cpu", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "skipped, no C++ compiler was found" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_a_build_for_cuda_needs_nvcc(tmp_path: Path) -> None:
    done = build(tmp_path, "cuda", PATH=str(tmp_path), CXX=shutil.which("c++") or "c++")
    assert "csrc for cuda: skipped, nvcc is not on the PATH" in done.stdout


def test_an_unknown_build_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, "rocm")
    assert done.returncode != 0
    assert "PISSA_KERNELS_BUILD must be 0, cpu or cuda, got 'rocm'" in done.stderr
