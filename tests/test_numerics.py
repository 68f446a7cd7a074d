"""exact_arithmetic under every precision setting of torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import pissa_kernels as pk
from pissa_kernels.numerics import exact_arithmetic

from .support.reference import realistic

backends: Any = torch.backends
PRODUCTS = {"cuda.matmul": backends.cuda.matmul, "mkldnn.matmul": backends.mkldnn.matmul}
FULL_PRECISION = ("ieee", "none")
CPU = torch.device("cpu")
UNREADABLE = "RuntimeError"  # torch raises it where the two interfaces disagree


def set_all_backends(precision: str) -> None:
    # what transformers' TrainingArguments(tf32=True) does
    backends.fp32_precision = precision


def set_mkldnn_bf16() -> None:
    backends.mkldnn.matmul.fp32_precision = "bf16"


def set_cuda_matmul() -> None:
    backends.cuda.matmul.fp32_precision = "tf32"


def set_cudnn() -> None:
    backends.cudnn.fp32_precision = "tf32"


def allow_tf32() -> None:
    backends.cuda.matmul.allow_tf32 = True


def set_high_and_mkldnn() -> None:
    torch.set_float32_matmul_precision("high")
    set_mkldnn_bf16()


SETTINGS: dict[str, Callable[[], None]] = {
    "default": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuda.matmul.allow_tf32": allow_tf32,
    "fp32_precision ieee": lambda: set_all_backends("ieee"),
    "fp32_precision tf32": lambda: set_all_backends("tf32"),
    "fp32_precision bf16": lambda: set_all_backends("bf16"),
    "cuda.matmul.fp32_precision tf32": set_cuda_matmul,
    "cudnn.fp32_precision tf32": set_cudnn,
    "mkldnn.matmul.fp32_precision bf16": set_mkldnn_bf16,
    "high, then mkldnn.matmul.fp32_precision bf16": set_high_and_mkldnn,
}
REDUCED = [name for name in SETTINGS if name not in ("default", "highest", "fp32_precision ieee")]


def reset(products: dict[str, str]) -> None:
    backends.fp32_precision = "none"
    backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for name, precision in products.items():
        PRODUCTS[name].fp32_precision = precision


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    """torch's default precision before each test, and what was set before after it."""
    assert backends.fp32_precision == "none", "another test has left its setting behind"
    before = {name: products.fp32_precision for name, products in PRODUCTS.items()}
    reset(dict.fromkeys(PRODUCTS, "none"))
    yield
    reset(before)


def effective() -> dict[str, str]:
    """Every setting of float32 products that torch has, as it reads."""
    readable = {"generic": backends, "cudnn": backends.cudnn, "mkldnn": backends.mkldnn, **PRODUCTS}
    settings = {name: owner.fp32_precision for name, owner in readable.items()}
    try:
        settings["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        settings["float32_matmul_precision"] = UNREADABLE
    return settings


def is_exact() -> bool:
    return all(products.fp32_precision in FULL_PRECISION for products in PRODUCTS.values())


@pytest.mark.parametrize("name", REDUCED)
def test_the_reduced_settings_are_reduced(name: str) -> None:
    """Otherwise the other tests would show nothing."""
    SETTINGS[name]()
    assert not is_exact()


@pytest.mark.parametrize("name", SETTINGS)
def test_products_are_exact_inside_and_the_setting_is_restored(name: str) -> None:
    SETTINGS[name]()
    before = effective()
    with exact_arithmetic(CPU):
        assert is_exact()
        if before["float32_matmul_precision"] != UNREADABLE:
            assert torch.get_float32_matmul_precision() == "highest"
    assert effective() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_what_was_inherited_inherits_again(name: str) -> None:
    """A later change of torch.backends.fp32_precision has the effect that it has without the context."""

    def after_a_change(entered: bool) -> list[dict[str, str]]:
        reset(dict.fromkeys(PRODUCTS, "none"))
        SETTINGS[name]()
        if entered:
            with exact_arithmetic(CPU):
                pass
        seen = []
        for precision in ("tf32", "bf16", "ieee", "none"):
            set_all_backends(precision)
            seen.append(effective())
        return seen

    assert after_a_change(True) == after_a_change(False)


@pytest.mark.parametrize("name", SETTINGS)
def test_nested_contexts_restore_at_the_outermost(name: str) -> None:
    SETTINGS[name]()
    before = effective()
    with exact_arithmetic(CPU):
        inside = effective()
        with exact_arithmetic(CPU):
            assert effective() == inside
        assert effective() == inside
        assert is_exact()
    assert effective() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_an_exception_restores_the_setting(name: str) -> None:
    def fail_inside() -> None:
        with exact_arithmetic(CPU):
            assert is_exact()
            raise ZeroDivisionError

    SETTINGS[name]()
    before = effective()
    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert effective() == before
    with exact_arithmetic(CPU):
        assert is_exact()
    assert effective() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_the_last_of_two_threads_restores_the_setting(name: str) -> None:
    SETTINGS[name]()
    before = effective()
    leave = [threading.Event(), threading.Event()]
    entered = [threading.Event(), threading.Event()]

    def work(index: int) -> None:
        with exact_arithmetic(CPU):
            entered[index].set()
            assert leave[index].wait(60)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    try:
        for index in range(2):
            threads[index].start()
            assert entered[index].wait(60)
            assert is_exact()
        leave[0].set()
        threads[0].join(60)
        assert not threads[0].is_alive()
        assert threads[1].is_alive()
        assert is_exact(), "the second thread is still inside"
    finally:
        for index in range(2):
            leave[index].set()
            threads[index].join(60)
    assert effective() == before


def test_autocast_autograd_and_inference_mode_are_off_inside() -> None:
    X = torch.ones(3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), exact_arithmetic(CPU):
        product = X @ X
        assert not torch.is_grad_enabled()
    assert product.dtype == torch.float32
    assert not product.requires_grad
    assert not product.is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_arithmetic(CPU):
            pass
        assert (X @ X).dtype == torch.bfloat16, "autocast is on again"


def bits(W: Tensor) -> list[Tensor]:
    svd = pk.truncated_svd(W, 4)
    d = pk.decompose(W, 4, scaling=2.0)
    return [svd.U, svd.S, svd.Vh, d.lora_A, d.lora_B, d.residual]


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("shape", [(60, 50), (420, 400)])
def test_no_setting_changes_a_bit_of_the_result(name: str, shape: tuple[int, int]) -> None:
    W = realistic(*shape).float()
    expected = bits(W)
    SETTINGS[name]()
    before = effective()
    for ours, reference in zip(bits(W), expected, strict=True):
        assert torch.equal(ours, reference)
    assert effective() == before


def initialized_model() -> dict[str, Tensor]:
    model = nn.Sequential(nn.Linear(40, 32), nn.Linear(32, 24))
    for seed, layer in enumerate(model):
        layer.weight.data = realistic(*layer.weight.shape, seed=seed).float()
        layer.bias.data.zero_()
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["0", "1"])
    with pk.patch_peft() as report:
        adapted = peft.get_peft_model(model, config)
    assert len(report.layers) == 2
    return {name: tensor.detach().clone() for name, tensor in adapted.state_dict().items()}


@pytest.mark.parametrize("name", REDUCED)
def test_no_setting_changes_a_bit_of_an_initialized_model(name: str) -> None:
    expected = initialized_model()
    SETTINGS[name]()
    before = effective()
    found = initialized_model()
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key
    assert effective() == before
