// A slice of a low-rank factor in shared memory: how it gets there, and where its elements lie.
#pragma once

#include <cstdint>

#include "../matrix.h"
#include "convert.cuh"

namespace pissa::cuda {

constexpr int BANKS = 32;
constexpr int FLOATS = PER_ACCESS<float>;

// The direction in which a factor is contiguous decides which elements neighbouring threads read.
enum class Order { outer_vectors, outer, rank };

// (outer, rank): `outer` runs along the weight's rows for the left factor, along its columns for the right one.
struct Factor {
  const float* data;
  int64_t outer_stride, rank_stride;
  Order order;
};

inline Factor factor_of(const Matrix& matrix) {
  const auto* const data = static_cast<const float*>(matrix.data);
  Order order = matrix.row_stride <= matrix.col_stride ? Order::outer : Order::rank;
  if (matrix.row_stride == 1 && aligned(data, matrix.col_stride, sizeof(float), ACCESS_BYTES)) {
    order = Order::outer_vectors;
  }
  return {data, matrix.row_stride, matrix.col_stride, order};
}

// Reads `bytes` bytes without passing through a register, and fills up WIDTH floats with zeros.
template <int WIDTH>
__device__ inline void copy_async(float* shared, const float* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global),
               "n"(WIDTH * sizeof(float)), "r"(bytes)
               : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// EXTENT elements of each of DEPTH ranks. Four floats are skipped after every 32, so that eight threads that read four
// floats each, eight apart, meet no bank twice; the pitch is an odd number of fours, so that 8 ranks by 4 elements,
// which 32 threads write where the factor is contiguous along the rank, do not either.
template <int EXTENT, int DEPTH>
struct FactorTile {
  static constexpr int PITCH = EXTENT + EXTENT / BANKS * FLOATS - FLOATS;
  static_assert(EXTENT % BANKS == 0 && PITCH / FLOATS % 2 == 1);
  alignas(ACCESS_BYTES) float element[DEPTH][PITCH];

  static __host__ __device__ constexpr int place(int outer) { return outer + outer / BANKS * FLOATS; }

  // Where element `outer` of the first rank is.
  __device__ const float* at(int outer) const { return &element[0][place(outer)]; }

  // Begins to fetch `extent` elements from `outer` of `depth` ranks from `rank`; the rest of the tile becomes zero.
  template <int THREADS>
  __device__ void fetch(const Factor& factor, int64_t outer, int64_t rank, int extent, int depth) {
    const float* const corner = factor.data + outer * factor.outer_stride + rank * factor.rank_stride;
    // opaque, or the addresses of every order would be kept from slice to slice
    const int thread = opaque(static_cast<int>(threadIdx.x));
    if (factor.order == Order::outer_vectors) {
      fetch_along_outer<THREADS, FLOATS>(thread, corner, 1, factor.rank_stride, extent, depth);
    } else if (factor.order == Order::outer) {
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
          copy_async<1>(&element[first_rank + k][place(first + i)], row + k * factor.rank_stride,
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
      copy_async<WIDTH>(&element[first_rank + k][place(outer)], from, first_rank + k < depth ? bytes : 0);
    }
  }
};

}  // namespace pissa::cuda
