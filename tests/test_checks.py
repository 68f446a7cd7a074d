"""checks: the name of the layer in messages, and every refusal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pissa_kernels.checks import (
    DTYPE_SENTENCE,
    check_accuracy,
    check_rank,
    check_scaling,
    check_weight,
    layer_context,
    parse_init,
    quantization_of,
)

LAYER = "layer 'q_proj', weight (4, 5)"


def raise_in(*layers: str, error: Exception) -> None:
    """Raise in nested contexts, the outermost first."""
    if not layers:
        raise error
    with layer_context(layers[0]):
        raise_in(*layers[1:], error=error)


@pytest.mark.parametrize(
    "kind",
    [TypeError, ValueError, RuntimeError, MemoryError, torch.OutOfMemoryError, torch.linalg.LinAlgError],
)
def test_layer_context_adds_the_layer_and_keeps_the_type(kind: type[Exception]) -> None:
    raised = kind("no memory")
    with pytest.raises(kind) as caught:
        raise_in(LAYER, error=raised)
    assert caught.value is raised
    assert type(caught.value) is kind
    assert str(caught.value) == f"{LAYER}: no memory"


@pytest.mark.parametrize("kind", [KeyError, OSError, ZeroDivisionError])
def test_other_errors_pass_unchanged(kind: type[Exception]) -> None:
    raised = kind("x")
    with pytest.raises(kind) as caught:
        raise_in(LAYER, error=raised)
    assert caught.value is raised
    assert raised.args == ("x",)


def test_an_error_without_a_message_gets_the_layer() -> None:
    with pytest.raises(MemoryError) as caught:
        raise_in(LAYER, error=MemoryError())
    assert str(caught.value).startswith(LAYER)


def test_the_innermost_of_nested_contexts_names_the_layer_once() -> None:
    with pytest.raises(ValueError, match="wrong") as caught:
        raise_in("the batch", LAYER, error=ValueError("wrong"))
    assert str(caught.value) == f"{LAYER}: wrong"


def test_an_error_that_is_raised_again_keeps_its_first_layer() -> None:
    error = ValueError("wrong")
    for layer in (LAYER, "another layer"):
        with pytest.raises(ValueError, match="wrong"):
            raise_in(layer, error=error)
    assert str(error) == f"{LAYER}: wrong"


@pytest.mark.parametrize("rest", ["", " the weight is torch.int8."])
def test_pefts_sentence_stays_first(rest: str) -> None:
    with pytest.raises(TypeError) as caught:
        raise_in("a batch", LAYER, error=TypeError(DTYPE_SENTENCE + rest))
    assert str(caught.value).startswith(f"{DTYPE_SENTENCE} {LAYER}:")
    assert str(caught.value).count(DTYPE_SENTENCE) == 1
    assert str(caught.value).endswith(rest)


def test_the_sentence_is_the_one_that_peft_raises() -> None:
    """PEFT's users match it, so it is written out here."""
    assert DTYPE_SENTENCE == "Please initialize PiSSA under float32, float16, or bfloat16."


def test_without_an_error_nothing_happens() -> None:
    with layer_context(LAYER):
        check_rank(2, (4, 5))


@pytest.mark.parametrize(
    ("init", "niter"), [("pissa", None), ("pissa_niter_0", 0), ("pissa_niter_4", 4), ("pissa_niter_016", 16)]
)
def test_parse_init(init: str, niter: int | None) -> None:
    assert parse_init(init) == niter


@pytest.mark.parametrize(
    "init", ["", "PISSA", "pissa_16", "pissafoo", "foo_niter_4", "pissa_niter", "olora", True, None]
)
def test_parse_init_refuses_another_initializer_with_pefts_sentence(init: str) -> None:
    expected = f"init_lora_weights should be 'pissa' or 'pissa_niter_[number of iters]', got {init} instead."
    with pytest.raises(ValueError, match=r"^init_lora_weights should be") as caught:
        parse_init(init)
    assert str(caught.value) == expected


@pytest.mark.parametrize("rounds", ["", "x", "-1", "+1", "1.5", " 4", "4 ", "1_000", "²", "٤", "1_niter_2"])
def test_parse_init_refuses_rounds_that_are_no_integer(rounds: str) -> None:
    with pytest.raises(ValueError, match="takes an integer N ≥ 0, as in 'pissa_niter_4', got") as caught:
        parse_init(f"pissa_niter_{rounds}")
    assert repr(f"pissa_niter_{rounds}") in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_weight_accepts_any_layout(dtype: torch.dtype) -> None:
    weight = torch.ones(4, 5, dtype=dtype)
    for view in (weight, weight.mT, weight[::2], weight[:1].expand(3, 5), nn.Parameter(weight)):
        check_weight(view)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.ones(4, 5, dtype=torch.float64), TypeError, r"the weight is torch\.float64 with shape \(4, 5\)"),
        (torch.ones(4, 5, dtype=torch.int8), TypeError, r"torch\.int8.*initialized before it is quantized"),
        (torch.ones(4, 5).to(torch.float8_e4m3fn), TypeError, r"torch\.float8_e4m3fn"),
        (torch.ones(4, 5, dtype=torch.complex64), TypeError, r"torch\.complex64"),
        (torch.ones(0, 5), ValueError, r"empty \(shape \(0, 5\)\).*ZeRO-3.*gathered"),
        (torch.ones(0), ValueError, r"empty \(shape \(0,\)\)"),
        (torch.ones(5), ValueError, r"must be 2-D, got shape \(5,\), as FSDP leaves it: initialize PiSSA before"),
        (torch.ones(2, 4, 5), ValueError, r"must be 2-D, got shape \(2, 4, 5\)"),
        (torch.ones(4, 5, device="meta"), ValueError, "on the meta device and has no values"),
    ],
)
def test_check_weight_refuses(weight: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        check_weight(weight)
    assert str(caught.value).startswith(DTYPE_SENTENCE) == (error is TypeError)


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' class, which is recognized by its name."""


class Int8Params(nn.Parameter):
    """Stands for bitsandbytes' class, which is recognized by its name."""


class Packed(torch.Tensor):
    """A tensor subclass that has a float dtype, as torchao's have."""


@pytest.mark.parametrize("kind", [Params4bit, Int8Params])
def test_bitsandbytes_parameters_are_quantized(kind: type[nn.Parameter]) -> None:
    weight = kind(torch.ones(4, 5), requires_grad=False)
    assert quantization_of(weight) == f"bitsandbytes {kind.__name__}"
    with pytest.raises(
        TypeError, match=f"^{DTYPE_SENTENCE} the weight is quantized \\(bitsandbytes {kind.__name__}\\)"
    ):
        check_weight(weight)


def test_a_quant_state_marks_a_quantized_parameter() -> None:
    weight = nn.Parameter(torch.ones(4, 5))
    weight.quant_state = object()  # type: ignore[attr-defined]
    assert quantization_of(weight) == "bitsandbytes Parameter"


def test_a_tensor_subclass_is_quantized() -> None:
    weight = torch.ones(4, 5).as_subclass(Packed)
    assert quantization_of(weight) == f"tensor subclass {Packed.__module__}.Packed"
    with pytest.raises(TypeError, match="Load the model without quantization"):
        check_weight(weight)


@pytest.mark.parametrize("weight", [torch.ones(4, 5), nn.Parameter(torch.ones(4, 5)), torch.ones(4, 5).mT])
def test_a_plain_tensor_is_not_quantized(weight: torch.Tensor) -> None:
    assert quantization_of(weight) is None


def test_tensors_without_their_values_are_refused() -> None:
    """Stands for torch's class, which is recognized by its name."""
    weight = torch.ones(4, 5).as_subclass(type("FakeTensor", (torch.Tensor,), {}))
    with pytest.raises(ValueError, match="has no values"):
        check_weight(weight)


@pytest.mark.parametrize("rank", [1, 4])
def test_check_rank_accepts(rank: int) -> None:
    check_rank(rank, (4, 5))
    check_rank(rank, (5, 4))


@pytest.mark.parametrize("rank", [0, -1, 5, 6])
def test_check_rank_refuses(rank: int) -> None:
    words = rf"^the weight has shape \(4, 5\), so PiSSA takes a rank r with 1 ≤ r ≤ 4, got r={rank}$"
    with pytest.raises(ValueError, match=words):
        check_rank(rank, (4, 5))


@pytest.mark.parametrize("scaling", [1e-30, 0.5, 1, 64.0, 1e30])
def test_check_scaling_accepts(scaling: float) -> None:
    check_scaling(scaling)


@pytest.mark.parametrize("scaling", [1e-31, 1e31, 1e300])
def test_check_scaling_refuses_what_leaves_the_range_of_float32(scaling: float) -> None:
    with pytest.raises(ValueError, match=r"is 1e[-+]\d+, and the factors .* float32; accepted is 1e-30 to 1e\+30$"):
        check_scaling(scaling)


@pytest.mark.parametrize("scaling", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_check_scaling_refuses(scaling: float) -> None:
    with pytest.raises(ValueError, match=rf"scaling \(lora_alpha/r\), which must be above 0, got {scaling}$"):
        check_scaling(scaling)


@pytest.mark.parametrize(("tol", "niter"), [(1e-6, None), (0.999, None), (7.0, 0), (0.0, 16)])
def test_check_accuracy_accepts(tol: float, niter: int | None) -> None:
    check_accuracy(tol, niter)


@pytest.mark.parametrize(
    ("tol", "niter", "words"),
    [
        (0.0, None, r"^tol must lie between 0 and 1, got 0\.0$"),
        (1.0, None, r"^tol must lie between 0 and 1, got 1\.0$"),
        (-1e-6, None, "^tol must lie between 0 and 1"),
        (math.nan, None, "^tol must lie between 0 and 1, got nan$"),
        (1e-6, -1, "^niter must be 0 or more, got -1$"),
    ],
)
def test_check_accuracy_refuses(tol: float, niter: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_accuracy(tol, niter)
