"""Which backend runs, why not another, and what happens when one is forced."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.ops import csrc, dispatch

VERBS = [
    *("matmul", "rmatmul", "normal", "transpose_cast", "subtract_lowrank_", "sum_of_squares"),
    *("orthonormalize", "chebyshev_filter", "ritz", "triplets"),
]


@pytest.mark.parametrize("verb", VERBS)
def test_the_first_that_gives_no_reason_runs(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    W = torch.ones(4, 4)
    reasons = pk.ops.unsupported_reasons(verb, W)
    assert tuple(reasons) == pk.ops.BACKENDS
    assert reasons["torch"] == []
    order = dispatch.ORDER["cpu"][verb]
    assert pk.ops.backend(verb, W) == next(name for name in order if not reasons[name])
    assert pk.ops.backend(verb, W.to("meta")) == "torch"


def test_a_library_that_was_not_built_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(csrc.LIBRARIES, "cpu", "missing.so")
    monkeypatch.setattr(csrc, "_FAILURES", {})
    W = torch.ones(4, 4)
    assert "csrc was not built for cpu" in pk.ops.unsupported_reasons("transpose_cast", W)["csrc"][0]
    assert pk.ops.backend("transpose_cast", W) == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "csrc")
    with pytest.raises(RuntimeError, match=r"csrc cannot run on a \(4, 4\) float32 weight on cpu: csrc was not"):
        pk.ops.transpose_cast(W, torch.float32)
    monkeypatch.setitem(csrc.VERBS, "cpu", ("transpose_cast",))
    assert pk.ops.backend("matmul", W) == "torch"  # a verb that it does not have is not its business


def test_a_library_that_does_not_load_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = tmp_path_factory.mktemp("broken") / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setitem(csrc.LIBRARIES, "cpu", str(broken))
    monkeypatch.setattr(csrc, "_FAILURES", {})
    assert "does not load" in pk.ops.unsupported_reasons("transpose_cast", torch.ones(4, 4))["csrc"][0]


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cublas")
    with pytest.raises(ValueError, match="must be one of csrc, triton, torch, got 'cublas'"):
        pk.ops.matmul(torch.ones(4, 4), torch.ones(4, 1))


def test_torch_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert {pk.ops.backend(verb, torch.ones(4, 4)) for verb in VERBS} == {"torch"}


def test_double_panels_go_to_torch_whatever_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    W, X = torch.ones(4, 4), torch.ones(4, 1, dtype=torch.float64)
    assert pk.ops.matmul(W, X).dtype == torch.float64


def test_a_weight_with_no_contiguous_dimension_is_not_for_csrc() -> None:
    W = torch.ones(8, 8)[::2, ::2]
    assert any("neither dimension" in reason for reason in pk.ops.unsupported_reasons("transpose_cast", W)["csrc"])
    assert torch.equal(pk.ops.transpose_cast(W, torch.bfloat16), torch.ones(4, 4).bfloat16())


def test_a_slice_of_a_stack_whose_weights_are_apart_is_for_csrc() -> None:
    stack = torch.ones(3, 8, 8)
    assert (
        pk.ops.unsupported_reasons("matmul", stack[:, ::2])["csrc"]
        == pk.ops.unsupported_reasons("matmul", stack)["csrc"]
    )
    assert any(
        "neither dimension" in reason for reason in pk.ops.unsupported_reasons("matmul", stack.permute(2, 0, 1))["csrc"]
    )


def test_triton_on_the_cpu_needs_its_interpreter() -> None:
    code = "import torch, pissa_kernels as pk; print(pk.ops.unsupported_reasons('matmul', torch.ones(2, 2))['triton'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment(TRITON_INTERPRET="0")
    )
    assert "TRITON_INTERPRET was not 1" in done.stdout or "cannot be imported" in done.stdout


def test_importing_the_package_loads_no_backend() -> None:
    code = (
        "import sys, pissa_kernels; "
        "print(*(name in sys.modules for name in ('triton', 'pissa_kernels.ops.triton', 'pissa_kernels.ops.csrc')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3


def test_verbs_leave_no_graph_and_accept_parameters() -> None:
    W = torch.nn.Parameter(torch.ones(6, 4))
    before = W._version
    pk.ops.subtract_lowrank_(W, torch.ones(6, 1), torch.ones(1, 4), 1.0)
    assert W.sum() == 0
    assert W._version > before  # autograd would notice a tensor that was saved before
    assert not pk.ops.matmul(W, torch.ones(4, 2)).requires_grad
    assert not pk.ops.transpose_cast(W, torch.bfloat16).requires_grad


def test_pieces_are_one_two_or_three() -> None:
    with pytest.raises(ValueError, match="pieces must be 1, 2 or 3, got 4"):
        pk.ops.matmul(torch.ones(4, 4), torch.ones(4, 1), pieces=4)


def _environment(**changes: str) -> dict[str, str]:
    return os.environ | changes
