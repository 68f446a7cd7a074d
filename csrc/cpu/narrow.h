// W·X and Wᵀ·Y for panels of at most eight columns, where broadcasting every element of W is what takes the time.
//
// Vectors lie along W's rows instead: an element of W, straight from memory, meets four columns of the panel. X and Z,
// which have a row for each of W's columns, are turned for it, or parted.
#pragma once

#include "patch.h"

namespace {

// What sixteen registers hold: for W·X two rows' sums with four columns, for Wᵀ·Y three rows of Y.
constexpr int SUMMED_ROWS = 2, ADDED_ROWS = 3;
constexpr int64_t COLUMNS = 8, HALF = 4;
// Columns of W whose part of X or Z, 16 KiB, stays in the first cache.
constexpr int64_t NARROW_DEPTH = 512;
// Rows from those at work to those that memory is asked for, whole groups of either.
constexpr int64_t AHEAD = 6;

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
    f32x8 row = load<f32x8>(X + j * LANES);
    hold(row);
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i) sum[i][j] += w[i] * row;
  }
}

// (row j of eight of Z) += Σᵢ w[i]·y[i][j] for four of them. The products are summed first: one after the other they
// would lengthen the sum that Z is, and its rounding, ROWS-fold.
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

// f(w, offset into a panel) for the vectors of ROWS rows of W, two at a time, over `cols` columns, whole lines of W;
// what will be read next begins `ahead` elements further.
template <class T, int ROWS, class F>
inline __attribute__((always_inline)) void for_vectors(const typename T::Scalar* W, int64_t stride, int64_t cols,
                                                       int64_t ahead, const F& f) {
  constexpr int64_t STEP = LINE / sizeof(typename T::Scalar), PAIR = 2 * LANES;
  for (int64_t c = 0; c < cols; c += STEP) {
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i) __builtin_prefetch(W + i * stride + c + ahead);
#pragma GCC unroll 2
    for (int64_t d = c; d < c + STEP; d += PAIR) {
      f32x8 first[ROWS], second[ROWS];
#pragma GCC unroll 3
      for (int i = 0; i < ROWS; ++i) first[i] = load_part<T, 0>(W + i * stride + d);
      f(first, d * COLUMNS);
#pragma GCC unroll 3
      for (int i = 0; i < ROWS; ++i) second[i] = load_part<T, 1>(W + i * stride + d);
      f(second, (d + LANES) * COLUMNS);
    }
  }
}

// ROWS rows of Y += those of W·X over `cols` columns.
template <class T, int ROWS>
__attribute__((noinline)) void multiply_rows_narrow(const typename T::Scalar* W, int64_t stride, const float* X,
                                                    int64_t cols, float* Y, int64_t ahead) {
  f32x8 sums[ROWS][COLUMNS];
#pragma GCC unroll 2
  for (int half = 0; half < COLUMNS; half += HALF) {
    f32x8 sum[ROWS][HALF] = {};
    for_vectors<T, ROWS>(W, stride, cols, ahead, [&](const f32x8* w, int64_t at) __attribute__((always_inline)) {
      add_products<ROWS>(w, X + at + half * LANES, sum);
    });
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < HALF; ++j) sums[i][half + j] = sum[i][j];
  }
#pragma GCC unroll 2
  for (int i = 0; i < ROWS; ++i) store(Y + i * COLUMNS, load<f32x8>(Y + i * COLUMNS) + add_lanes(sums[i]));
}

// `cols` rows of Z += those of Wᵀ·Y that ROWS rows of W and Y make.
template <class T, int ROWS>
__attribute__((noinline)) void add_rows_narrow(const typename T::Scalar* W, int64_t stride, const float* Y,
                                               int64_t cols, float* Z, int64_t ahead) {
#pragma GCC unroll 2
  for (int half = 0; half < COLUMNS; half += HALF) {
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

// f(count, W from row i and column col, its stride, i, col, cols, ahead) for `count` of W's rows [row, row + rows) at a
// time, ROWS of them or what is left one by one, and as many columns as stay in the first cache with their part of a
// panel. What is no whole line comes with zeros, from a copy.
template <class T, int ROWS, class F>
inline __attribute__((always_inline)) void for_rows(const pissa::Matrix& weight, int64_t row, int64_t rows,
                                                    int64_t begin, int64_t end, const F& f) {
  typedef typename T::Scalar Scalar;
  constexpr int64_t STEP = LINE / sizeof(Scalar);
  const int64_t stride = weight.row_stride;
  for (int64_t col = begin; col < end; col += NARROW_DEPTH) {
    const Scalar* const W = static_cast<const Scalar*>(weight.data) + row * stride + col;
    const int64_t cols = smaller(end - col, NARROW_DEPTH), rest = cols % STEP, whole = cols - rest;
    const auto some = [&](auto count, int64_t i, int64_t ahead) {
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
      const int64_t next = i + AHEAD;  // after the last rows, the first again, further on
      some(Count<ROWS>{}, i, next < grouped ? AHEAD * stride : (AHEAD - grouped) * stride + NARROW_DEPTH);
    }
    for (; i < rows; ++i) some(Count<1>{}, i, stride);
  }
}

template <class T>
void multiply_narrow(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                     const Panel& X, const Panel& Y) {
  for_rows<T, SUMMED_ROWS>(weight, row, rows, begin, end,
                           [&](auto count, const typename T::Scalar* W, int64_t stride, int64_t i, int64_t col,
                               int64_t cols, int64_t ahead) {
                             multiply_rows_narrow<T, count.value>(W, stride, X.data + col * COLUMNS, cols,
                                                                  Y.data + i * COLUMNS, ahead);
                           });
}

template <class T>
void multiply_adjoint_narrow(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                             const Panel& Y, int64_t Y_row, const Panel& Z) {
  for_rows<T, ADDED_ROWS>(weight, row, rows, begin, end,
                          [&](auto count, const typename T::Scalar* W, int64_t stride, int64_t i, int64_t col,
                              int64_t cols, int64_t ahead) {
                            add_rows_narrow<T, count.value>(W, stride, Y.data + (Y_row + i) * COLUMNS, cols,
                                                            Z.data + col * COLUMNS, ahead);
                          });
}

}  // namespace
