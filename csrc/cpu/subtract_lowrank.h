// W −= s·B·A in place: a tiled matrix product that is subtracted while it is in registers.
#pragma once

#include "simd.h"

namespace {

// The register tile of the product: 6 × 16 floats in 12 of AVX2's 16 registers, 12 × 32 in 24 of AVX-512's 32.
#if defined(__AVX512F__)
typedef f32x16 Wide;
constexpr int64_t TILE_ROWS = 12;
#else
typedef f32x8 Wide;
constexpr int64_t TILE_ROWS = 6;
#endif
constexpr int64_t WIDTH = sizeof(Wide) / sizeof(float), TILE_COLS = 2 * WIDTH;
// Floats of `right` in a packed panel: 64 KiB, which stay in L2 while the weight streams past. High ranks take more,
// MIN_TILES tiles, because `left` is packed again for each panel of `right`.
constexpr int64_t PACKED_FLOATS = 16 << 10, MIN_TILES = 8;

// Products in one partial sum: rounding errors grow with the length of a sum.
constexpr int64_t SUM_RANKS = 128;

inline int64_t packed_cols(int64_t rank) {
  const int64_t tiles = PACKED_FLOATS / (TILE_COLS * (rank > 0 ? rank : 1));
  return TILE_COLS * (tiles > MIN_TILES ? tiles : MIN_TILES);
}

int64_t subtract_workspace(int64_t rank) { return (packed_cols(rank) + TILE_ROWS) * rank; }

// Packs `cols` columns as [cols / TILE_COLS][rank][TILE_COLS], with zeros beyond the last column.
inline void pack_right(const pissa::Matrix& right, int64_t first, int64_t cols, float* packed) {
  for (int64_t j = 0; j < cols; j += TILE_COLS) {
    for (int64_t k = 0; k < right.rows; ++k) {
      const float* from = static_cast<const float*>(right.data) + k * right.row_stride + (first + j) * right.col_stride;
      for (int64_t c = 0; c < TILE_COLS; ++c) *packed++ = j + c < cols ? from[c * right.col_stride] : 0.0f;
    }
  }
}

// Packs `rows` rows as [rank][TILE_ROWS], with zeros beyond the last row.
inline void pack_left(const pissa::Matrix& left, int64_t first, int64_t rows, float* packed) {
  for (int64_t k = 0; k < left.cols; ++k) {
    const float* from = static_cast<const float*>(left.data) + first * left.row_stride + k * left.col_stride;
    for (int64_t i = 0; i < TILE_ROWS; ++i) *packed++ = i < rows ? from[i * left.row_stride] : 0.0f;
  }
}

template <class T>
inline __attribute__((always_inline)) void subtract_tile(typename T::Scalar* W, int64_t stride, const float* left,
                                                         const float* right, int64_t rank, float scaling, int64_t rows,
                                                         int64_t cols) {
  Wide total[TILE_ROWS][2] = {};
  for (int64_t begin = 0; begin < rank; begin += SUM_RANKS) {
    const int64_t end = rank - begin < SUM_RANKS ? rank : begin + SUM_RANKS;
    Wide sum[TILE_ROWS][2] = {};
    for (int64_t k = begin; k < end; ++k) {
      const Wide first = load<Wide>(right + k * TILE_COLS), second = load<Wide>(right + k * TILE_COLS + WIDTH);
#pragma GCC unroll 12
      for (int i = 0; i < TILE_ROWS; ++i) {
        sum[i][0] += left[k * TILE_ROWS + i] * first;
        sum[i][1] += left[k * TILE_ROWS + i] * second;
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < TILE_ROWS; ++i) {
      total[i][0] += sum[i][0];
      total[i][1] += sum[i][1];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < TILE_ROWS; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int64_t j = 0; j < TILE_COLS; j += LANES) {
      const f32x8 product = j % WIDTH == 0 ? lower(total[i][j / WIDTH]) : upper(total[i][j / WIDTH]);
      typename T::Scalar* to = W + i * stride + j;
      const int64_t count = cols - j;
      if (count >= LANES) {
        store_rounded<T>(to, load_wide<T>(to) - scaling * product);
      } else if (count > 0) {
        store_rounded<T>(to, load_wide<T>(to, count) - scaling * product, count);
      }
    }
  }
}

template <class T>
void subtract_lowrank(const pissa::Matrix& weight, const pissa::Matrix& left, const pissa::Matrix& right, float scaling,
                      int64_t begin, int64_t end, float* workspace) {
  const int64_t rank = left.cols, panel = packed_cols(rank);
  float* const packed_left = workspace;
  float* const packed_right = workspace + TILE_ROWS * rank;
  for (int64_t first = 0; first < weight.cols; first += panel) {
    const int64_t cols = weight.cols - first < panel ? weight.cols - first : panel;
    pack_right(right, first, cols, packed_right);
    for (int64_t row = begin; row < end; row += TILE_ROWS) {
      const int64_t rows = end - row < TILE_ROWS ? end - row : TILE_ROWS;
      pack_left(left, row, rows, packed_left);
      auto* W = static_cast<typename T::Scalar*>(weight.data) + row * weight.row_stride + first;
      for (int64_t j = 0; j < cols; j += TILE_COLS) {
        // the next tile's rows, which the hardware prefetcher does not expect: they do not follow these in memory
        for (int64_t i = TILE_ROWS; i < 2 * TILE_ROWS; ++i) __builtin_prefetch(W + i * weight.row_stride + j, 1);
        subtract_tile<T>(W + j, weight.row_stride, packed_left, packed_right + j * rank, rank, scaling, rows, cols - j);
      }
    }
  }
}

}  // namespace
