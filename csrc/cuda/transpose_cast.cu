// Wᵀ in another dtype, bound by memory bandwidth.
//
// Aligned shapes need no shared memory: a thread reads 16 bytes of each of a few rows, transposes them in registers
// and writes 16 bytes at a time. Of neighboring lanes four read 64 bytes of a row of W, and eight write a cache line
// of the result, so that all accesses of a warp cover whole sectors. A thread has all its loads (up to 128 bytes) in
// flight at once. Other shapes go through shared memory, which keeps narrow accesses coalesced.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../tensors.h"
#include "convert.cuh"
#include "launch.cuh"

namespace pissa::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;

// 16-byte vectors along each edge of a block's tile: 256 bytes of each row of W, and of each row of the result.
constexpr int TILE = 16;
// The threads of a tile: 4 warps of 4 lanes along a row of W, 2 warps of 8 lanes along a row of the result.
constexpr int ACROSS = 4, DOWN = WARP / ACROSS;
static_assert(TILE / ACROSS * (TILE / DOWN) == WARPS);

template <class Source, class Target>
__global__ void __launch_bounds__(THREADS)
    transpose_vectors(const Source* __restrict__ source, int64_t row_stride, Target* __restrict__ result, int64_t rows,
                 int64_t cols, unsigned tiles_across) {
  constexpr int ROWS = PER_ACCESS<Target>, COLS = PER_ACCESS<Source>;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int down = warp / (TILE / ACROSS) * DOWN + lane / ACROSS;
  const int across = warp % (TILE / ACROSS) * ACROSS + lane % ACROSS;
  const int64_t row = (int64_t{blockIdx.x / tiles_across} * TILE + down) * ROWS;
  const int64_t col = (int64_t{blockIdx.x % tiles_across} * TILE + across) * COLS;
  if (row >= rows || col >= cols) return;

  Vector<Source, COLS> in[ROWS];
  const Source* const from = source + row * row_stride + col;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) in[i] = load<COLS>(from + i * row_stride);
  Target* const to = result + col * rows + row;
#pragma unroll
  for (int j = 0; j < COLS; ++j) {
    Vector<Target, ROWS> out;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) out.element[i] = convert<Target>(in[i].element[j]);
    store(to + j * rows, out);
  }
}

constexpr int EDGE = 64;

template <class Source, class Target>
__global__ void __launch_bounds__(THREADS)
    transpose_elements(const Source* __restrict__ source, int64_t row_stride, Target* __restrict__ result, int64_t rows,
                  int64_t cols, unsigned tiles_across) {
  // always floats, with an odd pitch, so that the elements of a column are in different banks
  __shared__ float tile[EDGE][EDGE + 1];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t row = int64_t{blockIdx.x / tiles_across} * EDGE, col = int64_t{blockIdx.x % tiles_across} * EDGE;
#pragma unroll
  for (int i = warp; i < EDGE; i += WARPS) {
#pragma unroll
    for (int j = lane; j < EDGE; j += WARP) {
      if (row + i < rows && col + j < cols) tile[i][j] = widen(source[(row + i) * row_stride + col + j]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = warp; j < EDGE; j += WARPS) {
#pragma unroll
    for (int i = lane; i < EDGE; i += WARP) {
      if (row + i < rows && col + j < cols) result[(col + j) * rows + row + i] = convert<Target>(tile[i][j]);
    }
  }
}

// Rows that a thread of cast_rows copies, so that it has as many loads in flight.
constexpr int COPIES = 4;

// result = source (rows, cols), the transpose of a column-major weight: contiguous rows, `stride` apart.
template <int WIDTH, class Source, class Target>
__global__ void __launch_bounds__(THREADS)
    cast_rows(const Source* __restrict__ source, int64_t stride, Target* __restrict__ result, int64_t rows,
              int64_t cols, unsigned tiles_across) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t row = int64_t{blockIdx.x / tiles_across} * (WARPS * COPIES) + warp;
  const int64_t col = (int64_t{blockIdx.x % tiles_across} * WARP + lane) * WIDTH;
  if (col >= cols) return;
  Vector<Source, WIDTH> in[COPIES];
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    const Source* const from = source + (row + i * WARPS) * stride + col;
    if (row + i * WARPS < rows) in[i] = load<WIDTH>(from);
  }
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    Vector<Target, WIDTH> out;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) out.element[j] = convert<Target>(in[i].element[j]);
    Target* const to = result + (row + i * WARPS) * cols + col;
    if (row + i * WARPS < rows) store(to, out);
  }
}

template <class Source, class Target>
void transpose(const Matrix& W, Target* result, cudaStream_t stream) {
  const auto* const source = static_cast<const Source*>(W.data);
  constexpr int ROWS = PER_ACCESS<Target>, COLS = PER_ACCESS<Source>;
  if (W.rows % ROWS == 0 && W.cols % COLS == 0 && aligned(source, W.row_stride, sizeof(Source), ACCESS_BYTES)) {
    const Tiles tiles = tiles_of(W.rows, W.cols, TILE * ROWS, TILE * COLS);
    transpose_vectors<<<tiles.blocks, THREADS, 0, stream>>>(source, W.row_stride, result, W.rows, W.cols, tiles.across);
  } else {
    const Tiles tiles = tiles_of(W.rows, W.cols, EDGE, EDGE);
    transpose_elements<<<tiles.blocks, THREADS, 0, stream>>>(source, W.row_stride, result, W.rows, W.cols,
                                                             tiles.across);
  }
}

template <int WIDTH, class Source, class Target>
void launch_cast(const Matrix& V, Target* result, cudaStream_t stream) {
  const Tiles tiles = tiles_of(V.rows, V.cols, WARPS * COPIES, WARP * WIDTH);
  cast_rows<WIDTH><<<tiles.blocks, THREADS, 0, stream>>>(static_cast<const Source*>(V.data), V.row_stride, result,
                                                          V.rows, V.cols, tiles.across);
}

template <class Source, class Target>
void cast(const Matrix& V, Target* result, cudaStream_t stream) {
  // 16 bytes of the wider type, so that both the loads and the stores of neighboring lanes are contiguous
  constexpr int WIDTH = std::min(PER_ACCESS<Source>, PER_ACCESS<Target>);
  if (V.cols % WIDTH == 0 && aligned(V.data, V.row_stride, sizeof(Source), WIDTH * sizeof(Source))) {
    launch_cast<WIDTH, Source>(V, result, stream);
  } else {
    launch_cast<1, Source>(V, result, stream);
  }
}

using torch::stable::Tensor;

Tensor transpose_cast(const Tensor& weight, torch::headeronly::ScalarType dtype) {
  const Matrix W = matrix_of(weight), V = W.transposed();
  STD_TORCH_CHECK(W.row_contiguous() || V.row_contiguous(),
                  "pissa_kernels: one dimension of the weight must be contiguous");
  const int32_t device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor result = torch::stable::new_empty(weight, {V.rows, V.cols}, dtype);
  const Matrix out = matrix_of(result);
  if (out.rows == 0 || out.cols == 0) return result;
  const cudaStream_t stream = current_stream(device);
  with_element(W.dtype, [&](auto source) {
    with_element(out.dtype, [&](auto target) {
      auto* const to = static_cast<decltype(target)*>(out.data);
      if (V.row_contiguous()) {
        cast<decltype(source)>(V, to, stream);
      } else {
        transpose<decltype(source)>(W, to, stream);
      }
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace pissa::cuda

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CUDA, library) {
  library.impl("transpose_cast", TORCH_BOX(&pissa::cuda::transpose_cast));
}
