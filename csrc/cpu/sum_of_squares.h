// Sums of squares of a weight's rows.
#pragma once

#include "simd.h"

namespace {

// sums[i] = the sum of squares of row i, for rows [begin, end) of a weight with contiguous rows. A row has 32 float32
// sums, in four vectors that hide the latency of the additions; they are added in double precision.
template <class T>
void sum_of_squares(const pissa::Matrix& weight, int64_t begin, int64_t end, double* sums) {
  constexpr int CHAINS = 4;
  for (int64_t row = begin; row < end; ++row) {
    const auto* from = static_cast<const typename T::Scalar*>(weight.data) + row * weight.row_stride;
    f32x8 sum[CHAINS] = {};
    int64_t i = 0;
    for (; i + CHAINS * LANES <= weight.cols; i += CHAINS * LANES) {
#pragma GCC unroll 4
      for (int k = 0; k < CHAINS; ++k) {
        const f32x8 w = load_wide<T>(from + i + k * LANES);
        sum[k] += w * w;
      }
    }
    for (; i < weight.cols; i += LANES) {
      const int64_t left = weight.cols - i;
      const f32x8 w = load_wide<T>(from + i, left < LANES ? left : LANES);
      sum[0] += w * w;
    }
    double total = 0.0;
    for (int k = 0; k < CHAINS; ++k)
      for (int lane = 0; lane < LANES; ++lane) total += sum[k][lane];
    sums[row] = total;
  }
}

}  // namespace
