// A block of W, widened into a float32 buffer in L1.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using pissa::cpu::BLOCK_COLS;
using pissa::cpu::BLOCK_ROWS;
using pissa::cpu::Panel;
using pissa::cpu::STRIP_ROWS;

inline __attribute__((always_inline)) int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// buffer[i][j] = W[row + i][col + j] for i < rows and j < cols, and zeros for the rest of padded_rows × padded_cols.
// padded_cols is a multiple of LANES. Rows of the buffer are `pitch` floats apart.
template <class T>
inline void widen_block(const pissa::Matrix& weight, int64_t row, int64_t col, int64_t rows, int64_t cols,
                        int64_t padded_rows, int64_t padded_cols, int64_t pitch, float* buffer) {
  const auto* from = static_cast<const typename T::Scalar*>(weight.data) + row * weight.row_stride + col;
  for (int64_t i = 0; i < padded_rows; ++i, from += weight.row_stride, buffer += pitch) {
    int64_t j = 0;
    if (i < rows) {
      for (; j + LANES <= cols; j += LANES) store(buffer + j, load_wide<T>(from + j));
      if (j < cols) {
        store(buffer + j, load_wide<T>(from + j, cols - j));
        j += LANES;
      }
    }
    for (; j < padded_cols; j += LANES) store(buffer + j, f32x8{});
  }
}

// f(strip, first column) for strips of STRIP_ROWS columns of W's rows [row, row + rows), at most BLOCK_ROWS rows. The
// next block is prefetched between strips, because its short rows do not train the hardware prefetcher. It goes to L2,
// because in L1 the rows of a weight whose width is a power of two map to the same sets and evict each other.
template <class T, class F>
inline __attribute__((always_inline)) void for_strips(const pissa::Matrix& weight, int64_t row, int64_t rows,
                                                      int64_t begin, int64_t end, const F& f) {
  constexpr int64_t BYTES = sizeof(typename T::Scalar);
  alignas(LINE_BYTES) float block[BLOCK_ROWS * BLOCK_COLS];
  for (int64_t col = begin; col < end; col += BLOCK_COLS) {
    const int64_t cols = smaller(end - col, BLOCK_COLS);
    widen_block<T>(weight, row, col, rows, cols, rows, BLOCK_COLS, BLOCK_COLS, block);
    for (int64_t j = 0; j < cols; j += STRIP_ROWS) {
      for (int64_t i = rows * j / BLOCK_COLS; cols == BLOCK_COLS && i < rows * (j + STRIP_ROWS) / BLOCK_COLS; ++i) {
        const char* next =
            static_cast<const char*>(weight.data) + ((row + i) * weight.row_stride + col + BLOCK_COLS) * BYTES;
        for (int64_t byte = 0; byte < BLOCK_COLS * BYTES; byte += LINE_BYTES) __builtin_prefetch(next + byte, 0, 2);
      }
      f(block + j, col + j);
    }
  }
}

}  // namespace
