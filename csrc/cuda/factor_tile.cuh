// A slice of a low-rank factor in shared memory: asynchronous copies, and a layout without bank conflicts.
#pragma once

#include <cstdint>

#include "../matrix.h"
#include "convert.cuh"

namespace pissa::cuda {

constexpr int BANKS = 32;
constexpr int FLOATS = PER_ACCESS<float>;

// The dimension in which a factor is contiguous and neighboring threads read; `outer_aligned` allows vectorized copies.
enum class Contiguous { outer_aligned, outer, rank };

// A factor (outer, rank). `outer` is the weight's row for the left factor and its column for the right one.
struct Factor {
  const float* data;
  int64_t outer_stride, rank_stride;
  Contiguous contiguous;
};

inline Factor factor_of(const Matrix& matrix) {
  const auto* const data = static_cast<const float*>(matrix.data);
  Contiguous contiguous = matrix.row_stride <= matrix.col_stride ? Contiguous::outer : Contiguous::rank;
  if (matrix.row_stride == 1 && aligned(data, matrix.col_stride, sizeof(float), ACCESS_BYTES)) {
    contiguous = Contiguous::outer_aligned;
  }
  return {data, matrix.row_stride, matrix.col_stride, contiguous};
}

// Copies `bytes` bytes to shared memory without a register in between, and zeros the rest of WIDTH floats.
template <int WIDTH>
__device__ inline void copy_async(float* shared, const float* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global),
               "n"(WIDTH * sizeof(float)), "r"(bytes)
               : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// EXTENT elements of each of DEPTH ranks, without bank conflicts. Four floats of padding follow every 32, for reads of
// four floats by each of eight threads, eight floats apart. The pitch is an odd multiple of four, for the writes of 8
// ranks by 4 elements that a warp makes where the factor is contiguous along the rank.
template <int EXTENT, int DEPTH>
struct FactorTile {
  static constexpr int PITCH = EXTENT + EXTENT / BANKS * FLOATS - FLOATS;
  static_assert(EXTENT % BANKS == 0 && PITCH / FLOATS % 2 == 1);
  alignas(ACCESS_BYTES) float element[DEPTH][PITCH];

  static __host__ __device__ constexpr int offset(int outer) { return outer + outer / BANKS * FLOATS; }

  // Pointer to element `outer` of the first rank.
  __device__ const float* at(int outer) const { return &element[0][offset(outer)]; }

  // Starts to copy `extent` elements from `outer` on, of `depth` ranks from `rank` on; the rest of the tile gets zeros.
  template <int THREADS>
  __device__ void fetch(const Factor& factor, int64_t outer, int64_t rank, int extent, int depth) {
    const float* const corner = factor.data + outer * factor.outer_stride + rank * factor.rank_stride;
    // opaque, because the compiler would keep the addresses of all three branches in registers between slices
    const int thread = opaque(static_cast<int>(threadIdx.x));
    if (factor.contiguous == Contiguous::outer_aligned) {
      fetch_along_outer<THREADS, FLOATS>(thread, corner, 1, factor.rank_stride, extent, depth);
    } else if (factor.contiguous == Contiguous::outer) {
      fetch_along_outer<THREADS, 1>(thread, corner, factor.outer_stride, factor.rank_stride, extent, depth);
    } else {
      constexpr int RANKS = 8;
      static_assert(DEPTH % RANKS == 0 && EXTENT % (THREADS / RANKS) == 0);
      const int first_rank = thread % RANKS, first = thread / RANKS;
      const float* row = corner + first * factor.outer_stride + first_rank * factor.rank_stride;
#pragma unroll
      for (int i = 0; i < EXTENT; i += THREADS / RANKS, row += THREADS / RANKS * factor.outer_stride) {
#pragma unroll
        for (int k = 0; k < DEPTH; k += RANKS) {
          const bool exists = first + i < extent && first_rank + k < depth;
          copy_async<1>(&element[first_rank + k][offset(first + i)], row + k * factor.rank_stride,
                        exists ? sizeof(float) : 0);
        }
      }
    }
  }

 private:
  template <int THREADS, int WIDTH>
  __device__ void fetch_along_outer(int thread, const float* corner, int64_t outer_stride, int64_t rank_stride,
                                    int extent, int depth) {
    constexpr int COPIES = EXTENT / WIDTH, RANKS = THREADS / COPIES;
    static_assert(RANKS * COPIES == THREADS && DEPTH % RANKS == 0);
    const int outer = thread % COPIES * WIDTH, first_rank = thread / COPIES;
    const int bytes = static_cast<int>(sizeof(float)) * max(0, min(WIDTH, extent - outer));
    const float* from = corner + outer * outer_stride + first_rank * rank_stride;
#pragma unroll
    for (int k = 0; k < DEPTH; k += RANKS, from += RANKS * rank_stride) {
      copy_async<WIDTH>(&element[first_rank + k][offset(outer)], from, first_rank + k < depth ? bytes : 0);
    }
  }
};

}  // namespace pissa::cuda
