// W·X and Wᵀ·Y for panels of at most eight columns.
//
// product.h broadcasts each element of W and multiplies it by the panel's columns; with so few columns the broadcasts
// take most of the time. Here vectors lie along W's rows and are loaded straight from memory. X and Z are packed with
// eight rows in a vector (Layout::transposed or Layout::deinterleaved), and four of their columns are in use at a time, so
// that a panel of at most four takes half the time.
#pragma once

#include "block.h"

namespace {

// Rows of W in a register tile, as many as fit 16 registers: W·X holds the sums of two rows with four columns, Wᵀ·Y the
// broadcast Y of three rows and four columns.
constexpr int MATMUL_ROWS = 2, ADJOINT_ROWS = 3;
constexpr int64_t COLUMNS = 8, HALF = 4;
// Columns of W in a pass, whose part of X or Z (16 KiB) stays in L1, for USED columns of these.
template <int64_t USED>
constexpr int64_t PASS_COLS = 512 * COLUMNS / USED;
// Rows from the current one to the one that is prefetched, a multiple of both register tiles.
constexpr int64_t PREFETCH_ROWS = 6;

// The sums over the lanes of eight vectors.
inline __attribute__((always_inline)) f32x8 horizontal_sums(const f32x8* v) {
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

// sum[i][j] += w[i]·(column j of eight rows of X), for four columns.
template <int ROWS>
inline __attribute__((always_inline)) void add_products(const f32x8* w, const float* X, f32x8 (*sum)[HALF]) {
#pragma GCC unroll 4
  for (int j = 0; j < HALF; ++j) {
    f32x8 column = load<f32x8>(X + j * LANES);
    keep_in_register(column);
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i) sum[i][j] += w[i] * column;
  }
}

// (column j of eight rows of Z) += Σᵢ w[i]·y[i][j], for four columns. The products are added to each other first: added
// to Z one by one, they would lengthen its sum, and increase its rounding error, ROWS-fold.
template <int ROWS>
inline __attribute__((always_inline)) void add_to_rows(const f32x8* w, const f32x8 (*y)[HALF], float* Z) {
#pragma GCC unroll 4
  for (int j = 0; j < HALF; ++j) {
    f32x8 sum = w[0] * y[0][j];
#pragma GCC unroll 3
    for (int i = 1; i < ROWS; ++i) sum += w[i] * y[i][j];
    store(Z + j * LANES, load<f32x8>(Z + j * LANES) + sum);
  }
}

// f(w, offset into a panel) for the vectors of ROWS rows of W over `cols` columns, which fill whole cache lines.
// Prefetches what is `ahead` elements further on.
template <class T, int ROWS, class F>
inline __attribute__((always_inline)) void for_vectors(const typename T::Scalar* W, int64_t stride, int64_t cols,
                                                       int64_t ahead, const F& f) {
  constexpr int64_t STEP = LINE_BYTES / sizeof(typename T::Scalar), PAIR = 2 * LANES;
  for (int64_t line = 0; line < cols; line += STEP) {
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i) __builtin_prefetch(W + i * stride + line + ahead);
#pragma GCC unroll 2
    for (int64_t col = line; col < line + STEP; col += PAIR) {
      f32x8 first[ROWS], second[ROWS];
#pragma GCC unroll 3
      for (int i = 0; i < ROWS; ++i) first[i] = load_half<T, 0>(W + i * stride + col);
      f(first, col * COLUMNS);
#pragma GCC unroll 3
      for (int i = 0; i < ROWS; ++i) second[i] = load_half<T, 1>(W + i * stride + col);
      f(second, (col + LANES) * COLUMNS);
    }
  }
}

// ROWS rows of Y += those of W·X, over `cols` columns of W, for the first USED columns of X.
template <class T, int ROWS, int64_t USED>
__attribute__((noinline)) void multiply_rows_narrow(const typename T::Scalar* W, int64_t stride, const float* X,
                                                    int64_t cols, float* Y, int64_t ahead) {
  static_assert(USED == COLUMNS || ROWS <= 2, "two rows of four sums fill the vectors of a horizontal sum");
  f32x8 sums[USED == COLUMNS ? ROWS : 1][COLUMNS] = {};
#pragma GCC unroll 2
  for (int half = 0; half < USED; half += HALF) {
    f32x8 sum[ROWS][HALF] = {};
    for_vectors<T, ROWS>(W, stride, cols, ahead, [&](const f32x8* w, int64_t at) __attribute__((always_inline)) {
      add_products<ROWS>(w, X + at + half * LANES, sum);
    });
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < HALF; ++j) (USED == COLUMNS ? sums[i][half + j] : sums[0][i * HALF + j]) = sum[i][j];
  }
  if constexpr (USED == COLUMNS) {
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i) store(Y + i * COLUMNS, load<f32x8>(Y + i * COLUMNS) + horizontal_sums(sums[i]));
  } else {
    const f32x8 both = horizontal_sums(sums[0]);
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < HALF; ++j) Y[i * COLUMNS + j] += both[i * HALF + j];
  }
}

// `cols` rows of Z += (ROWS rows of W)ᵀ·(the same rows of Y), for the first USED columns of Y.
template <class T, int ROWS, int64_t USED>
__attribute__((noinline)) void add_rows_narrow(const typename T::Scalar* W, int64_t stride, const float* Y,
                                               int64_t cols, float* Z, int64_t ahead) {
#pragma GCC unroll 2
  for (int half = 0; half < USED; half += HALF) {
    f32x8 y[ROWS][HALF];
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < HALF; ++j) y[i][j] = f32x8{} + Y[i * COLUMNS + half + j];
    for_vectors<T, ROWS>(W, stride, cols, ahead, [&](const f32x8* w, int64_t at) __attribute__((always_inline)) {
      add_to_rows<ROWS>(w, y, Z + at + half * LANES);
    });
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// f(count, pointer to W[row + i][col], its stride, i, col, cols, ahead) for the rows [row, row + rows) of W, `count` at
// a time: ROWS, or one at the end. A pass covers at most PASS columns. Columns that do not fill a cache line are
// copied to a buffer and followed by zeros.
template <class T, int ROWS, int64_t PASS, class F>
inline __attribute__((always_inline)) void for_rows(const pissa::Matrix& weight, int64_t row, int64_t rows,
                                                    int64_t begin, int64_t end, const F& f) {
  typedef typename T::Scalar Scalar;
  constexpr int64_t STEP = LINE_BYTES / sizeof(Scalar);
  const int64_t stride = weight.row_stride;
  for (int64_t col = begin; col < end; col += PASS) {
    const Scalar* const W = static_cast<const Scalar*>(weight.data) + row * stride + col;
    const int64_t cols = smaller(end - col, PASS), rest = cols % STEP, whole = cols - rest;
    const auto call = [&](auto count, int64_t i, int64_t ahead) {
      if (whole > 0) f(count, W + i * stride, stride, i, col, whole, ahead);
      if (rest == 0) return;
      Scalar line[count.value * STEP] = {};
      for (int64_t k = 0; k < count.value; ++k)
        for (int64_t j = 0; j < rest; ++j) line[k * STEP + j] = W[(i + k) * stride + whole + j];
      f(count, line, STEP, i, col + whole, STEP, 0);
    };
    const int64_t grouped = rows / ROWS * ROWS;
    int64_t i = 0;
    for (; i < grouped; i += ROWS) {
      const int64_t next = i + PREFETCH_ROWS;  // past the last rows, the first rows of the next pass
      call(Count<ROWS>{}, i, next < grouped ? PREFETCH_ROWS * stride : (PREFETCH_ROWS - grouped) * stride + PASS);
    }
    for (; i < rows; ++i) call(Count<1>{}, i, stride);
  }
}

template <class T, int64_t USED>
void multiply_narrow(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                     const Panel& X, const Panel& Y) {
  for_rows<T, MATMUL_ROWS, PASS_COLS<USED>>(weight, row, rows, begin, end,
                           [&](auto count, const typename T::Scalar* W, int64_t stride, int64_t i, int64_t col,
                               int64_t cols, int64_t ahead) {
                             multiply_rows_narrow<T, count.value, USED>(W, stride, X.data + col * COLUMNS, cols,
                                                                  Y.data + i * COLUMNS, ahead);
                           });
}

template <class T, int64_t USED>
void multiply_adjoint_narrow(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                             const Panel& Y, int64_t Y_row, const Panel& Z) {
  for_rows<T, ADJOINT_ROWS, PASS_COLS<USED>>(weight, row, rows, begin, end,
                            [&](auto count, const typename T::Scalar* W, int64_t stride, int64_t i, int64_t col,
                                int64_t cols, int64_t ahead) {
                              add_rows_narrow<T, count.value, USED>(W, stride, Y.data + (Y_row + i) * COLUMNS, cols,
                                                              Z.data + col * COLUMNS, ahead);
                            });
}

}  // namespace
