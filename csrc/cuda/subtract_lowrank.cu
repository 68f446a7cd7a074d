// W −= s·B·A in place: a tiled product of float32 fused multiply-adds, subtracted while it is in registers.
//
// The loads of the weight are issued before the product and used after it, which hides their latency. The factors are
// copied to shared memory in slices of the rank, double-buffered: one slice is multiplied while the next is copied. A
// thread computes 8 × 8 elements, so that four 16-byte reads of shared memory feed 64 multiply-adds.
#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "convert.cuh"
#include "factor_tile.cuh"
#include "launch.cuh"

namespace pissa::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int WARP = 32;
// A thread's elements in each dimension, and the arrangement of lanes and warps in a tile.
constexpr int PER_THREAD = 8;
constexpr int LANES_ACROSS = 8, LANES_DOWN = WARP / LANES_ACROSS;
constexpr int WARPS_ACROSS = 2, WARPS_DOWN = THREADS / WARP / WARPS_ACROSS;
constexpr int TILE_ROWS = WARPS_DOWN * LANES_DOWN * PER_THREAD;
constexpr int TILE_COLS = WARPS_ACROSS * LANES_ACROSS * PER_THREAD;
// Ranks in a slice. The last slice is padded with zeros to a multiple of STEP.
constexpr int SLICE = 16, STEP = 2;
static_assert(SLICE % STEP == 0);
// Leaves a thread 168 registers: 64 for sums, 32 or 64 for weights, 16 for the operands of the multiply-adds.
constexpr int BLOCKS_PER_SM = 3;

struct Slices {
  FactorTile<TILE_ROWS, SLICE> left;
  FactorTile<TILE_COLS, SLICE> right;
};

// 16 bytes of the weight as loaded. They are not split into elements before they are used: the compiler would extract
// the halves of each word before the product, and wait for the load there.
using Packed = Vector<uint32_t, ACCESS_BYTES / sizeof(uint32_t)>;

// Loads at most `count` elements, which may be negative or exceed a vector; with VECTORS, all elements or none.
template <bool VECTORS, class T>
__device__ void load_partial(Packed& to, const T* from, int count) {
  if constexpr (VECTORS) {
    if (count > 0) to = load<ACCESS_BYTES / sizeof(uint32_t)>(reinterpret_cast<const uint32_t*>(from));
  } else {
    Vector<T, PER_ACCESS<T>> elements;
#pragma unroll
    for (int i = 0; i < PER_ACCESS<T>; ++i) {
      if (i < count) elements.element[i] = from[i];
    }
    memcpy(&to, &elements, sizeof(to));
  }
}

template <class T>
__device__ Vector<T, PER_ACCESS<T>> unpack(Packed from) {
#pragma unroll
  for (uint32_t& word : from.element) word = opaque(word);
  Vector<T, PER_ACCESS<T>> elements;
  memcpy(&elements, &from, sizeof(elements));
  return elements;
}

template <bool VECTORS, class T, int N>
__device__ void store_partial(T* to, const Vector<T, N>& from, int count) {
  if constexpr (VECTORS) {
    if (count > 0) store(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) to[i] = from.element[i];
    }
  }
}

__device__ void read(float* to, const float* shared) {
  const auto four = load<FLOATS>(shared);
#pragma unroll
  for (int i = 0; i < FLOATS; ++i) to[i] = four.element[i];
}

// sum += left·right for a thread's rows and columns. `left` and `right` point into the first rank of a slice; the last
// four columns are `apart` floats behind the first four. Further unrolling exceeds the registers.
__device__ __forceinline__ void multiply(float (&sum)[PER_THREAD][PER_THREAD], const float* left, const float* right,
                                         int apart, int depth) {
  for (int first = 0; first < depth; first += STEP) {
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      float down[PER_THREAD], across[PER_THREAD];
      read(down, left);
      read(down + FLOATS, left + FLOATS);
      read(across, right);
      read(across + FLOATS, right + apart);
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i) {
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) sum[i][j] = fmaf(down[i], across[j], sum[i][j]);
      }
      left += FactorTile<TILE_ROWS, SLICE>::PITCH;
      right += FactorTile<TILE_COLS, SLICE>::PITCH;
    }
  }
}

template <bool VECTORS, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    subtract(T* weight, int64_t row_stride, int64_t rows, int64_t cols, Factor left, Factor right, int64_t rank,
             float scaling, unsigned tiles_across) {
  // A thread's 16-byte accesses to a row. Those of eight lanes are contiguous, so that a store fills whole sectors.
  constexpr int N = PER_ACCESS<T>, ACCESSES = PER_THREAD / N, APART = LANES_ACROSS * N;
  __shared__ Slices slices[2];
  const int64_t top = int64_t{blockIdx.x / tiles_across} * TILE_ROWS;
  const int64_t start = int64_t{blockIdx.x % tiles_across} * TILE_COLS;
  const int height = static_cast<int>(min(int64_t{TILE_ROWS}, rows - top));
  const int width = static_cast<int>(min(int64_t{TILE_COLS}, cols - start));
  const auto fetch = [&](Slices& to, int64_t first) {
    const int depth = static_cast<int>(min(int64_t{SLICE}, rank - first));
    to.left.template fetch<THREADS>(left, top, first, height, depth);
    to.right.template fetch<THREADS>(right, start, first, width, depth);
  };
  fetch(slices[0], 0);

  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int row = (warp / WARPS_ACROSS * LANES_DOWN + lane / LANES_ACROSS) * PER_THREAD;
  const int col = warp % WARPS_ACROSS * LANES_ACROSS * PER_THREAD + lane % LANES_ACROSS * N;
  const auto element = [&](int i, int access) {
    return weight + (top + row + i) * row_stride + start + col + access * APART;
  };
  const auto count = [&](int i, int access) { return row + i < height ? width - col - access * APART : 0; };

  Packed W[PER_THREAD][ACCESSES];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
#pragma unroll
    for (int a = 0; a < ACCESSES; ++a) load_partial<VECTORS>(W[i][a], element(i, a), count(i, a));
  }

  float sum[PER_THREAD][PER_THREAD] = {};
  int current = 0;
  for (int64_t first = 0; first < rank; first += SLICE, current ^= 1) {
    // after the barrier all threads' copies are complete, and no thread reads the other buffer
    wait_for_copies();
    __syncthreads();
    if (first + SLICE < rank) fetch(slices[current ^ 1], first + SLICE);
    multiply(sum, slices[current].left.at(row), slices[current].right.at(col),
             FactorTile<TILE_COLS, SLICE>::offset(ACCESSES == 1 ? FLOATS : APART),
             static_cast<int>(min(int64_t{SLICE}, rank - first)));
  }

  row = opaque(row);  // so that the addresses of eight rows are not kept in registers during the product
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
#pragma unroll
    for (int a = 0; a < ACCESSES; ++a) {
      Vector<T, N> w = unpack<T>(W[i][a]);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        w.element[j] = convert<T>(fmaf(-scaling, sum[i][a * N + j], widen(w.element[j])));
      }
      store_partial<VECTORS>(element(i, a), w, count(i, a));
    }
  }
}

using torch::stable::Tensor;

void subtract_lowrank(const Tensor& weight, const Tensor& lora_B, const Tensor& lora_A, double scaling,
                      bool fan_in_fan_out) {
  const auto [W, left, right] = subtraction_of(weight, lora_B, lora_A, fan_in_fan_out);
  const int32_t device = weight.get_device_index();
  STD_TORCH_CHECK(lora_B.get_device_index() == device && lora_A.get_device_index() == device,
                  "pissa_kernels: the weight, B and A must be on one device");
  if (W.rows == 0 || W.cols == 0 || left.cols == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const Tiles tiles = tiles_of(W.rows, W.cols, TILE_ROWS, TILE_COLS);
  const Factor rows = factor_of(left), cols = factor_of(right.transposed());
  // C++17 lambdas capture structured bindings only with an initializer
  with_element(W.dtype, [&, &W = W, rank = left.cols](auto element) {
    using T = decltype(element);
    const bool vectors = W.cols % PER_ACCESS<T> == 0 && aligned(W.data, W.row_stride, sizeof(T), ACCESS_BYTES);
    const auto kernel = vectors ? subtract<true, T> : subtract<false, T>;
    kernel<<<tiles.blocks, THREADS, 0, stream>>>(static_cast<T*>(W.data), W.row_stride, W.rows, W.cols, rows, cols,
                                                 rank, static_cast<float>(scaling), tiles.across);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace pissa::cuda

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CUDA, library) {
  library.impl("subtract_lowrank_", TORCH_BOX(&pissa::cuda::subtract_lowrank));
}
