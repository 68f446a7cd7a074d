"""Memory that a thread reuses from one tensor to the next."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pissa_kernels.files.buffer import BLOCK, LARGE_PAGE, Buffer
from pissa_kernels.files.header import read_header, read_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (700, 300), (3, 5, 7)])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = Buffer().take(shape, dtype)
    assert tensor.shape == torch.Size(shape)
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert torch.equal(tensor.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_each_thread_has_its_own_memory() -> None:
    buffer = Buffer()
    large = buffer.take((1 << 20,), torch.float32)
    again = buffer.take((1000, 3), torch.bfloat16)
    assert again.data_ptr() == large.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(buffer.take, (1 << 20,), torch.float32).result()
    assert other.data_ptr() != large.data_ptr()
    other.fill_(1)
    large.fill_(2)
    assert bool((other == 1).all())


@pytest.mark.parametrize("at", [0, 2, 8, BLOCK - 2, BLOCK, 7 * BLOCK + 1000])
def test_offset_in_a_block_is_that_in_the_file(at: int) -> None:
    buffer = Buffer()
    for length in (1, BLOCK, 3 * BLOCK):  # the memory grows and is then reused
        tensor = buffer.take((length,), torch.bfloat16, at)
        assert (tensor.data_ptr() - at) % BLOCK == 0
        assert int(tensor.fill_(1).sum()) == length


def test_memory_is_whole_huge_pages() -> None:
    """Linux aligns only such a mapping to huge pages."""
    buffer = Buffer()
    buffer.take((LARGE_PAGE,), torch.uint8)
    assert len(buffer._memory) == 2 * LARGE_PAGE
    buffer.take((100,), torch.uint8)
    assert len(buffer._memory) == 2 * LARGE_PAGE
    assert len(Buffer().take((100,), torch.uint8)) == 100


def test_elements_are_aligned_even_where_the_file_is_not() -> None:
    assert Buffer().take((5,), torch.float32, at=1002).data_ptr() % 4 == 0


def test_memory_grows() -> None:
    buffer = Buffer()
    for mib in (1, 9, 33):
        tensor = buffer.take((mib << 20,), torch.uint8).fill_(mib)
        assert int(tensor.sum()) == mib * len(tensor)


def test_out_of_memory() -> None:
    with pytest.raises(MemoryError, match=f"{(1 << 60) + LARGE_PAGE} bytes: "):
        Buffer().take((1 << 60,), torch.uint8)


def test_tensors_read_into_one_buffer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(64, 33), "b": torch.randn(700, 300).bfloat16(), "c": torch.randn(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    header, buffer = read_header(tmp_path / "model.safetensors"), Buffer()
    descriptor = os.open(tmp_path / "model.safetensors", os.O_RDONLY)
    try:
        for name, expected in tensors.items():
            assert torch.equal(read_tensor(descriptor, header.tensors[name], buffer), expected), name
    finally:
        os.close(descriptor)
