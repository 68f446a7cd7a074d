// A patch of W, widened into a float32 buffer that stays in the first cache.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using pissa::cpu::BAND;
using pissa::cpu::Panel;
using pissa::cpu::SPAN;
using pissa::cpu::STRIPE;

constexpr int64_t LINE = 64;

inline __attribute__((always_inline)) int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// patch[i][j] = W[row + i][col + j] for i < rows and j < cols, zeros for what is left of `all_rows` and `all_cols`,
// a multiple of LANES
template <class T>
inline void widen(const pissa::Matrix& weight, int64_t row, int64_t col, int64_t rows, int64_t cols, int64_t all_rows,
                  int64_t all_cols, int64_t pitch, float* patch) {
  const auto* from = static_cast<const typename T::Scalar*>(weight.data) + row * weight.row_stride + col;
  for (int64_t i = 0; i < all_rows; ++i, from += weight.row_stride, patch += pitch) {
    int64_t j = 0;
    if (i < rows) {
      for (; j + LANES <= cols; j += LANES) store(patch + j, load_wide<T>(from + j));
      if (j < cols) {
        store(patch + j, load_wide<T>(from + j, cols - j));
        j += LANES;
      }
    }
    for (; j < all_cols; j += LANES) store(patch + j, f32x8{});
  }
}

// f(piece of a patch, its first column) for pieces of STRIPE columns of W's rows [row, row + rows), at most BAND. What
// the next patch needs is asked for between the pieces: its short rows are not what a CPU foresees by itself. It comes to
// the second cache, because in the first the rows of a weight whose width is a power of two evict each other.
template <class T, class F>
inline __attribute__((always_inline)) void for_patches(const pissa::Matrix& weight, int64_t row, int64_t rows,
                                                       int64_t begin, int64_t end, const F& f) {
  constexpr int64_t BYTES = sizeof(typename T::Scalar);
  alignas(LINE) float patch[BAND * SPAN];
  for (int64_t col = begin; col < end; col += SPAN) {
    const int64_t cols = smaller(end - col, SPAN);
    widen<T>(weight, row, col, rows, cols, rows, SPAN, SPAN, patch);
    for (int64_t j = 0; j < cols; j += STRIPE) {
      for (int64_t i = rows * j / SPAN; cols == SPAN && i < rows * (j + STRIPE) / SPAN; ++i) {
        const char* next = static_cast<const char*>(weight.data) + ((row + i) * weight.row_stride + col + SPAN) * BYTES;
        for (int64_t line = 0; line < SPAN * BYTES; line += LINE) __builtin_prefetch(next + line, 0, 2);
      }
      f(patch + j, col + j);
    }
  }
}

}  // namespace
