// PᵀP and P·M for a panel P of eight columns with the layout `transposed`.
#pragma once

#include "narrow.h"

namespace {

// Rows that are summed in float32 before their sum is added in double precision; 16 KiB, which stay in L1.
constexpr int64_t GRAM_ROWS = 512;

// gram = PᵀP. A pass computes two rows i of it, in one or both halves of the columns j: up to the half that holds the
// diagonal. Symmetry gives the rest.
inline void gram(const Panel& panel, double* gram) {
  for (int64_t i = 0; i < COLUMNS * COLUMNS; ++i) gram[i] = 0.0;
  for (int64_t begin = 0; begin < panel.rows; begin += GRAM_ROWS) {
    const int64_t end = smaller(begin + GRAM_ROWS, panel.rows);
    for (int64_t i = 0; i < COLUMNS; i += 2) {
      for (int64_t half = 0; half <= i; half += HALF) {
        f32x8 sum[2][HALF] = {}, v[2];
        for (int64_t row = begin; row < end; row += LANES) {
          const float* const block = panel.data + row * COLUMNS;
#pragma GCC unroll 2
          for (int k = 0; k < 2; ++k) v[k] = load<f32x8>(block + (i + k) * LANES);
          add_products<2>(v, block + half * LANES, sum);
        }
        const f32x8 total = horizontal_sums(sum[0]);
        for (int k = 0; k < 2; ++k)
          for (int j = 0; j < HALF; ++j) gram[(i + k) * COLUMNS + half + j] += total[k * HALF + j];
      }
    }
  }
  for (int64_t i = 0; i < HALF; ++i)
    for (int64_t j = HALF; j < COLUMNS; ++j) gram[i * COLUMNS + j] = gram[j * COLUMNS + i];
}

// P = P·M for a row-major, upper triangular M (8, 8).
inline void transform(const Panel& panel, const float* M) {
  for (int64_t row = 0; row < panel.rows; row += LANES) {
    float* const block = panel.data + row * COLUMNS;
    f32x8 v[COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < COLUMNS; ++i) v[i] = load<f32x8>(block + i * LANES);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      f32x8 sum = M[j] * v[0];
#pragma GCC unroll 8
      for (int i = 1; i <= j; ++i) sum += M[i * COLUMNS + j] * v[i];
      store(block + j * LANES, sum);
    }
  }
}

}  // namespace
