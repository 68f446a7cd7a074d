"""The formats of bitsandbytes: codes against its own layers, what quantizing twice changes, and what is stored."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pissa_kernels.ops import csrc
from pissa_kernels.quantize.bnb import (
    STATE_BYTES,
    EightBit,
    FourBit,
    PackedEightBit,
    PackedFourBit,
    _has_kernel,
    _table,
    standard_state,
)

bnb = pytest.importorskip("bitsandbytes", reason="the formats are those of bitsandbytes, which is not installed")
functional = bnb.functional

KINDS = ("nf4", "fp4")
needs_library = pytest.mark.skipif(csrc._failure("cpu") is not None, reason=str(csrc._failure("cpu")))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A block whose scale is smaller does not keep its codes. bitsandbytes divides a float32 block by max(scale, 1e-38), and
# values far below float16's smallest normal number, 6e-5, have few bits: the second code of FP4 is 0.0052.
SMALLEST_SCALE = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-9}


def four_bits(packed: PackedFourBit) -> Tensor:
    """The code of each element. FP4 has two codes of the value 0, 0 and 8, and the second becomes the first."""
    codes = expanded(packed.codes)
    return codes.where(codes != 8, 0) if packed.state.quant_type == "fp4" else codes


def scales(packed: PackedFourBit) -> Tensor:
    """The scale of each element, float32."""
    state = packed.state
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    expanded_scales: Tensor = absmax.float().repeat_interleave(state.blocksize)
    return expanded_scales[: packed.shape[0] * packed.shape[1]]


def expanded(codes: Tensor) -> Tensor:
    """The code of each element, as an index."""
    pairs = codes.flatten().view(torch.uint8)
    return torch.stack([pairs >> 4, pairs & 15], dim=1).flatten().long()


def exact_values(packed: PackedFourBit) -> Tensor:
    """Codes times scales, element by element."""
    values: Tensor = packed.state.code[expanded(packed.codes)] * scales(packed)
    return values.view(packed.shape).to(packed.state.dtype)


def twice(packed: PackedFourBit, scheme: FourBit) -> PackedFourBit:
    return scheme.quantize(packed.dequantize().float(), packed.state.dtype)


def random(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@st.composite
def matrices(draw: st.DrawFn, outliers: bool) -> Tensor:
    """Values of one magnitude; some are 0, and with outliers each row has one that is up to 1e4 times as large."""
    m, n = draw(st.integers(1, 40)), 2 * draw(st.integers(1, 80))
    values = random(m, n, draw(st.integers(0, 2**31)))
    values[torch.rand(m, n, generator=torch.Generator().manual_seed(1)) < draw(st.sampled_from([0.0, 0.3]))] = 0
    if outliers:
        values[:, draw(st.integers(0, n - 1))] *= 10.0 ** draw(st.integers(0, 4))
    return values


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    weight=matrices(outliers=True),
    block=st.sampled_from([32, 64, 128, 256, 1024]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 30),
)
def test_quantizing_dequantized_values_gives_the_same_codes(
    kind: str, weight: Tensor, block: int, dtype: torch.dtype, exponent: int
) -> None:
    scheme = FourBit(kind, block)
    largest = float(weight.abs().amax())
    if dtype == torch.float16:  # scales of 0.002 to 60000
        weight = weight * (2.0 ** (exponent % 16) / max(largest, 1.0))
    else:
        weight = weight * 10.0**exponent
    packed = scheme.quantize(weight, dtype)
    again = twice(packed, scheme)
    keeps = (scales(packed) == 0) | (scales(packed) > SMALLEST_SCALE[dtype])
    assert dtype == torch.float16 or keeps.all()
    assert torch.equal(four_bits(again)[keeps], four_bits(packed)[keeps])
    if dtype == torch.float32:  # in 16 bits a scale is rounded the first time, and a product may differ by one rounding
        assert torch.equal(again.dequantize(), packed.dequantize())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(weight=matrices(outliers=False), block=st.sampled_from([32, 64, 256]), dtype=st.sampled_from(DTYPES[:2]))
def test_double_quantization_keeps_the_codes_too(kind: str, weight: Tensor, block: int, dtype: torch.dtype) -> None:
    scheme = FourBit(kind, block, double=True)
    packed = scheme.quantize(weight, dtype)
    # The scales are quantized to 8 bits by blocks of 256, less their mean, which leaves an error in proportion to the
    # largest. Beside a large one, a small one becomes inexact, and may even become negative: then its signs change.
    keeps = scales(packed) > 0
    zero = four_bits(packed) == (7 if kind == "nf4" else 0)
    assert torch.equal(four_bits(twice(packed, scheme))[keeps | zero], four_bits(packed)[keeps | zero])
    if float(weight.abs().amin()) > 0:  # no block of zeros
        assert keeps.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "block", "double"), [*itertools.product(KINDS, (64, 128), (False, True))])
def test_zeros_stay_zeros(kind: str, block: int, double: bool, dtype: torch.dtype) -> None:
    scheme = FourBit(kind, block, double)
    packed = scheme.quantize(torch.zeros(16, 24), dtype)
    assert torch.equal(packed.dequantize(), torch.zeros(16, 24, dtype=dtype))
    assert torch.equal(four_bits(twice(packed, scheme)), four_bits(packed))


def test_subnormal_blocks_are_dequantized_to_at_most_1e_38() -> None:
    weight = random(8, 64) * 1e-39
    for kind in KINDS:
        values = FourBit(kind).quantize(weight, torch.float32).dequantize()
        assert values.isfinite().all()
        assert (values.abs() <= 1.001e-38).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "block", "double", "storage"),
    [
        *itertools.product(KINDS, (64, 256), (False, True), (torch.uint8,)),
        *(("nf4", 64, True, storage) for storage in (torch.bfloat16, torch.float16, torch.float32)),
    ],
)
def test_codes_are_those_of_a_4_bit_layer(
    kind: str, block: int, double: bool, storage: torch.dtype, dtype: torch.dtype
) -> None:
    weight = random(96, 64).to(dtype)
    layer = four_bit_layer(weight, kind, block, double, storage)
    scheme = FourBit(kind, block, double, storage)
    packed = scheme.quantize(weight.float(), dtype)
    state = layer.weight.quant_state
    assert torch.equal(packed.codes.view(torch.uint8), layer.weight.data.view(torch.uint8))
    assert packed.codes.shape == layer.weight.shape
    assert packed.codes.dtype == layer.weight.dtype == storage
    stored = layer.state_dict()
    assert packed.tensors().keys() == stored.keys()
    if double:  # the layer's mean of the scales is a float32 sum, whose last digits depend on the number of threads
        assert torch.allclose(packed.state.offset, state.offset, rtol=1e-6)
    for key, value in packed.tensors().items():
        if key.startswith("weight.quant_state."):
            assert bytes(value.tolist()).endswith(b" ")
        else:
            assert value.dtype == stored[key].dtype
            assert torch.allclose(value.double(), stored[key].double(), rtol=1e-6, atol=0, equal_nan=True), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 48), (33, 50), (5, 96), (2, 1), (16, 576), (3, 4096)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_codes_times_scales_in_any_shape(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows that are no multiple of a block, where bitsandbytes' kernel for AVX-512 takes the scales of other blocks."""
    for block, double in ((32, False), (64, True), (256, False), (1024, False), (4096, False)):
        packed = FourBit(kind, block, double).quantize(random(*shape), dtype)
        assert torch.equal(packed.dequantize(), exact_values(packed)), (block, double)
        if shape[1] % block == 0 and block <= 1024:
            assert torch.equal(packed.dequantize(), functional.dequantize_4bit(packed.codes, packed.state))


@pytest.mark.parametrize("threads", [1, 2])
def test_double_quantization_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    weight = random(2048, 1100, seed=3)  # of 35200 scales; a sum in float32 is split among threads
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        packed = FourBit("nf4", 64, double=True).quantize(weight, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    exact = FourBit("nf4", 64).quantize(weight, torch.bfloat16).state.absmax.double().mean()
    assert float(packed.state.offset) == float(exact.float())


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(weight=matrices(outliers=True), block=st.sampled_from([32, 64, 256, 4096]))
def test_codes_of_csrc_are_those_of_bitsandbytes(kind: str, weight: Tensor, block: int) -> None:
    values = weight.flatten()[: weight.numel() // 2 * 2]
    assert _has_kernel(values)
    table = _table(kind)
    if tuple(map(int, bnb.__version__.split(".")[:2])) < (0, 50):
        assert table is None
        pytest.skip(f"bitsandbytes {bnb.__version__} makes other codes, and csrc is not used")
    assert table is not None
    codes, scales = csrc.quantize_blocks(values, block, *table)
    expected, state = functional.quantize_4bit(values, blocksize=block, quant_type=kind)
    assert torch.equal(codes, expected.flatten())
    assert torch.equal(scales, state.absmax)


@needs_library
def test_a_version_with_other_codes_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = functional.quantize_4bit

    def other(values: Tensor, **options: Any) -> Any:
        return quantize(values * 1.001, **options)

    monkeypatch.setattr(functional, "quantize_4bit", other)
    _has_kernel(torch.ones(64))  # which loads the library
    assert _table.__wrapped__("nf4") is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 128), (33, 250), (1, 4098)])
def test_quantizing_in_chunks_changes_nothing(
    shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(*shape)
    whole = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    monkeypatch.setattr("pissa_kernels.quantize.bnb.CHUNK_ELEMENTS", 4096)
    monkeypatch.setenv("PISSA_KERNELS_BACKEND", "torch")  # csrc takes a weight at a time
    packed = FourBit(kind).quantize(weight, torch.float32)
    assert torch.equal(packed.codes, whole[0])
    assert torch.equal(packed.state.absmax, whole[1].absmax)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    by_rows = EightBit().quantize(weight, torch.float32)
    assert torch.equal(by_rows.codes, codes)
    assert torch.equal(by_rows.scales, scales)


def four_bit_layer(
    weight: Tensor, kind: str, block: int = 64, double: bool = False, storage: torch.dtype = torch.uint8
) -> Any:
    m, n = weight.shape
    layer = bnb.nn.Linear4bit(n, m, bias=False, quant_type=kind, compress_statistics=double, quant_storage=storage)
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), blocksize=block, quant_type=kind, compress_statistics=double, quant_storage=storage
    )
    return layer.to("cpu")


@pytest.mark.parametrize("shape", [(64, 48), (1, 6), (33, 50), (7, 1)])
@pytest.mark.parametrize(
    "scheme",
    [
        FourBit("nf4"),
        FourBit("nf4", 128, double=True),
        FourBit("fp4", 32, double=True),
        FourBit("fp4", 1024),
        FourBit("nf4", 64, double=True, storage=torch.bfloat16),
        FourBit("nf4", 64, storage=torch.float32),
        EightBit(),
    ],
    ids=str,
)
def test_a_stored_weight_is_read_back_as_it_was(scheme: FourBit | EightBit, shape: tuple[int, int]) -> None:
    elements = shape[0] * shape[1]
    if isinstance(scheme, FourBit) and elements % (2 * scheme.storage.itemsize):
        for call in (lambda: scheme.layout(shape), lambda: scheme.quantize(random(*shape), torch.bfloat16)):
            with pytest.raises(ValueError, match=f"packs pairs of values into .* the weight has {elements}"):
                call()
        return
    packed = scheme.quantize(random(*shape), torch.bfloat16)
    tensors = packed.tensors()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()} == scheme.layout(shape)
    assert all(value.is_contiguous() for value in tensors.values())
    again = scheme.unpack({key: value.clone() for key, value in tensors.items()})
    assert again.shape == packed.shape == shape
    assert again.dequantize().dtype == packed.dequantize().dtype
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert {key: bytes(value.view(torch.uint8).flatten().tolist()) for key, value in again.tensors().items()} == {
        key: bytes(value.view(torch.uint8).flatten().tolist()) for key, value in tensors.items()
    }


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_reads_the_padded_state(dtype: torch.dtype, double: bool) -> None:
    packed = FourBit("nf4", 64, double).quantize(random(24, 64), dtype)
    tensors = packed.tensors()
    assert tensors["weight.quant_state.bitsandbytes__nf4"].shape == (STATE_BYTES,)
    statistics = {key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"}
    read = functional.QuantState.from_dict(dict(statistics), device=torch.device("cpu"))
    assert read.dtype == dtype
    assert (read.blocksize, tuple(read.shape), read.quant_type, read.nested) == (64, (24, 64), "nf4", double)
    assert torch.equal(functional.dequantize_4bit(tensors["weight"], read), packed.dequantize())
    parameter = bnb.nn.Params4bit.from_prequantized(tensors["weight"], dict(statistics), device="cpu")
    assert torch.equal(functional.dequantize_4bit(parameter.data, parameter.quant_state), packed.dequantize())


@pytest.mark.parametrize("key", ["weight.quant_state.bitsandbytes__nf4", "weight.absmax", "weight.quant_map"])
def test_a_damaged_state_is_refused(key: str) -> None:
    tensors = FourBit().quantize(random(16, 8), torch.float32).tensors()
    if "quant_state" in key:
        tensors[key] = tensors[key].clone().fill_(ord("x"))
    else:
        del tensors[key]
    with pytest.raises(ValueError, match="its quantization state is damaged"):
        FourBit().unpack(tensors)


@settings(max_examples=60, deadline=None)
@given(weight=matrices(outliers=True), exponent=st.integers(-7, 0))
def test_int8_codes_and_scales_are_kept(weight: Tensor, exponent: int) -> None:
    scheme = EightBit()
    weight = weight * 10.0**exponent  # down to float16's subnormal numbers
    packed = scheme.quantize(weight, torch.float16)
    again = scheme.quantize(packed.dequantize(), torch.float16)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.scales, packed.scales)
    half = weight.half().double()
    assert torch.equal(packed.scales.double(), half.abs().amax(1))
    # half a step, and the rounding of the float32 quotient near a tie
    assert ((packed.dequantize().double() - half).abs() <= (0.5 + 2e-5) / 127 * packed.scales.double()[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_an_8_bit_layer(dtype: torch.dtype) -> None:
    weight = random(48, 40).to(dtype)
    weight[3] = 0
    layer = bnb.nn.Linear8bitLt(40, 48, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    tensors = EightBit().quantize(weight.float(), dtype).tensors()
    stored = layer.state_dict()
    assert tensors.keys() == stored.keys()
    for key, value in tensors.items():
        assert value.dtype == stored[key].dtype
        assert torch.equal(value, stored[key]), key
    values = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert torch.allclose(EightBit().quantize(weight.float(), dtype).dequantize(), values, rtol=1e-6, atol=0)


def test_int8_refuses_what_float16_cannot_hold() -> None:
    weight = random(8, 6)
    weight[2, 3] = 1e5
    with pytest.raises(ValueError, match="int8 rounds the weight to float16 first, whose range it exceeds"):
        EightBit().quantize(weight, torch.bfloat16)


def test_int8_scales_have_one_value_for_each_row() -> None:
    packed = EightBit().quantize(random(8, 6), torch.bfloat16)
    damaged = packed.tensors() | {"SCB": packed.scales[:-1]}
    with pytest.raises(ValueError, match="SCB has shape"):
        EightBit().unpack(damaged)
    assert isinstance(EightBit().unpack(packed.tensors()), PackedEightBit)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_a_cpu_has_packed_otherwise_are_read(kind: str, double: bool, storage: torch.dtype) -> None:
    packed = FourBit(kind, 64, double, storage).quantize(random(64, 128), torch.float32)
    state = copy.deepcopy(packed.state)
    # what a layer in evaluation mode does to itself on CPUs with AVX512-BF16
    codes, state = functional._convert_weight_packed_for_cpu(packed.codes.clone(), state)
    before = codes.clone(), state.absmax.clone(), state.packing_format_for_cpu
    found = standard_state(codes, state)
    assert torch.equal(found.codes.view(torch.uint8), packed.codes.view(torch.uint8))
    assert found.codes.shape == packed.codes.shape
    rounded = scales(packed)[:: packed.state.blocksize].bfloat16().float()
    assert torch.equal(found.state.absmax, rounded)
    assert found.dequantize().dtype == torch.float32
    assert torch.equal(found.dequantize(), exact_values(found))
    stored = FourBit(kind, 64, False, storage).layout((64, 128))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in found.tensors().items()} == stored
    assert torch.equal(codes, before[0])
    assert torch.equal(state.absmax, before[1])
    assert state.packing_format_for_cpu is before[2] is True


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_those_that_an_evaluated_layer_uses(kind: str, double: bool) -> None:
    if not functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs weights otherwise only on CPUs with AVX512-BF16")
    layer = four_bit_layer(random(64, 128).bfloat16(), kind, double=double).eval()
    with torch.no_grad():
        used = layer(torch.eye(128, dtype=torch.bfloat16)).T
    assert layer.weight.quant_state.packing_format_for_cpu
    found = standard_state(layer.weight.data, layer.weight.quant_state)
    # its kernel rounds the table of codes to bfloat16, and the product with the scale
    table = found.state.code.bfloat16().float()
    assert torch.equal((table[expanded(found.codes)] * scales(found)).view(64, 128).bfloat16(), used)


def test_a_weight_in_the_standard_order_is_returned_as_it_is() -> None:
    packed = FourBit().quantize(random(16, 8), torch.float32)
    found = standard_state(packed.codes, packed.state)
    assert found.codes is packed.codes
    assert found.state is packed.state
