// Small problems of a turned panel P, eight columns of it: PᵀP and P·M.
#pragma once

#include "narrow.h"

namespace {

// Rows that are summed in float32, 16 KiB of them, before the sums join others in double.
constexpr int64_t GRAM_ROWS = 512;

// gram[i][j] = Σ of what columns i and j have in common, for j up to the end of i's four, and these again below.
inline void gram(const Panel& panel, double* gram) {
  for (int64_t i = 0; i < COLUMNS * COLUMNS; ++i) gram[i] = 0.0;
  for (int64_t begin = 0; begin < panel.rows; begin += GRAM_ROWS) {
    const int64_t end = smaller(begin + GRAM_ROWS, panel.rows);
    for (int64_t i = 0; i < COLUMNS; i += 2) {
      for (int64_t half = 0; half <= i; half += HALF) {
        f32x8 sum[2][HALF] = {}, v[2];
        for (int64_t row = begin; row < end; row += LANES) {
          const float* const eight = panel.data + row * COLUMNS;
#pragma GCC unroll 2
          for (int k = 0; k < 2; ++k) v[k] = load<f32x8>(eight + (i + k) * LANES);
          add_products<2>(v, eight + half * LANES, sum);
        }
        const f32x8 total = add_lanes(sum[0]);
        for (int k = 0; k < 2; ++k)
          for (int j = 0; j < HALF; ++j) gram[(i + k) * COLUMNS + half + j] += total[k * HALF + j];
      }
    }
  }
  for (int64_t i = 0; i < HALF; ++i)
    for (int64_t j = HALF; j < COLUMNS; ++j) gram[i * COLUMNS + j] = gram[j * COLUMNS + i];
}

// P = P·M, M upper triangular (8, 8) by rows.
inline void combine(const Panel& panel, const float* M) {
  for (int64_t row = 0; row < panel.rows; row += LANES) {
    float* const eight = panel.data + row * COLUMNS;
    f32x8 v[COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < COLUMNS; ++i) v[i] = load<f32x8>(eight + i * LANES);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      f32x8 sum = M[j] * v[0];
#pragma GCC unroll 8
      for (int i = 1; i <= j; ++i) sum += M[i * COLUMNS + j] * v[i];
      store(eight + j * LANES, sum);
    }
  }
}

}  // namespace
