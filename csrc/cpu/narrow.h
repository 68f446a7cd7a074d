// W·X and Wᵀ·Y for panels of at most eight columns, where broadcasting every element of W is what takes the time.
//
// Vectors lie along W's rows instead, so that an element is loaded once for four columns of the panel, and W·X needs no
// patch. X and Z, which have W's columns as rows, are `turned` for it.
#pragma once

#include "patch.h"

namespace {

// Rows and columns of a tile: with four columns of the panel 12 registers of sums.
constexpr int64_t NARROW_ROWS = 3, NARROW_COLS = 3 * LANES;
constexpr int64_t COLUMNS = 8, HALF = 4;
// Columns of W whose part of X, 16 KiB, stays in the first cache.
constexpr int64_t NARROW_DEPTH = 512;

// The sums of eight vectors' elements.
inline __attribute__((always_inline)) f32x8 add_lanes(const f32x8* v) {
  f32x8 pairs[4], fours[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    fours[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// sum[i][j] += w[i]·(row j of eight of X) for four of them
template <int ROWS>
inline __attribute__((always_inline)) void add_products(const f32x8* w, const float* X, f32x8 (*sum)[HALF]) {
#pragma GCC unroll 4
  for (int j = 0; j < HALF; ++j) {
    const f32x8 row = load<f32x8>(X + j * LANES);
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i) sum[i][j] += w[i] * row;
  }
}

// ROWS rows of Y += those of W·X, over `cols` columns; what will be read next begins `ahead` elements further.
template <class T, int ROWS>
__attribute__((noinline)) void multiply_rows_narrow(const typename T::Scalar* W, int64_t stride, const float* X,
                                                    int64_t cols, float* Y, int64_t ahead) {
  constexpr int64_t STEP = LINE / sizeof(typename T::Scalar);
  f32x8 sums[ROWS][COLUMNS];
#pragma GCC unroll 2
  for (int half = 0; half < COLUMNS; half += HALF) {
    f32x8 sum[ROWS][HALF] = {}, w[ROWS];
    int64_t c = 0;
    for (; c + STEP <= cols; c += STEP) {
#pragma GCC unroll 3
      for (int i = 0; i < ROWS; ++i) __builtin_prefetch(W + i * stride + c + ahead);
#pragma GCC unroll 4
      for (int64_t d = c; d < c + STEP; d += LANES) {
#pragma GCC unroll 3
        for (int i = 0; i < ROWS; ++i) w[i] = load_wide<T>(W + i * stride + d);
        add_products<ROWS>(w, X + d * COLUMNS + half * LANES, sum);
      }
    }
    for (; c < cols; c += LANES) {
#pragma GCC unroll 3
      for (int i = 0; i < ROWS; ++i) w[i] = load_wide<T>(W + i * stride + c, smaller(cols - c, LANES));
      add_products<ROWS>(w, X + c * COLUMNS + half * LANES, sum);
    }
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < HALF; ++j) sums[i][half + j] = sum[i][j];
  }
#pragma GCC unroll 3
  for (int i = 0; i < ROWS; ++i) store(Y + i * COLUMNS, load<f32x8>(Y + i * COLUMNS) + add_lanes(sums[i]));
}

template <class T>
void multiply_narrow(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                     const Panel& X, const Panel& Y) {
  const int64_t stride = weight.row_stride;
  for (int64_t col = begin; col < end; col += NARROW_DEPTH) {
    const auto* W = static_cast<const typename T::Scalar*>(weight.data) + row * stride + col;
    const float* const from = X.data + col * COLUMNS;
    const int64_t cols = smaller(end - col, NARROW_DEPTH);
    int64_t i = 0;
    for (; i + NARROW_ROWS <= rows; i += NARROW_ROWS) {
      const bool last = i + 2 * NARROW_ROWS > rows;  // back to the first rows, and on by NARROW_DEPTH
      const int64_t ahead = last ? NARROW_DEPTH - i * stride : NARROW_ROWS * stride;
      multiply_rows_narrow<T, NARROW_ROWS>(W + i * stride, stride, from, cols, Y.data + i * COLUMNS, ahead);
    }
    for (; i < rows; ++i) multiply_rows_narrow<T, 1>(W + i * stride, stride, from, cols, Y.data + i * COLUMNS, stride);
  }
}

// NARROW_COLS rows of Z += those of patchᵀ·Y.
inline void multiply_patch_narrow(const float* patch, const float* Y, int64_t rows, float* Z) {
#pragma GCC unroll 2
  for (int half = 0; half < COLUMNS; half += HALF) {
    f32x8 sum[HALF][3] = {};
    for (int64_t r = 0; r < rows; ++r) {
      f32x8 w[3];
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) w[v] = load<f32x8>(patch + r * SPAN + v * LANES);
#pragma GCC unroll 4
      for (int j = 0; j < HALF; ++j)
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v) sum[j][v] += w[v] * Y[r * COLUMNS + half + j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < HALF; ++j)
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) {
        float* const to = Z + v * LANES * COLUMNS + (half + j) * LANES;
        store(to, load<f32x8>(to) + sum[j][v]);
      }
  }
}

template <class T>
void multiply_adjoint_narrow(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                             const Panel& Y, int64_t Y_row, const Panel& Z) {
  for_patches<T>(weight, row, rows, begin, end, NARROW_COLS, [&](const float* patch, int64_t col) {
    multiply_patch_narrow(patch, Y.data + Y_row * COLUMNS, rows, Z.data + col * COLUMNS);
  });
}

}  // namespace
