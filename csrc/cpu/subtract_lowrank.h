// W −= s·B·A in place: a matrix product whose result is subtracted while it is in registers.
#pragma once

#include "simd.h"

namespace {

// A tile of the product in registers: 6 × 16 floats, 12 of AVX2's 16 registers.
constexpr int64_t TILE_ROWS = 6;
constexpr int64_t TILE_COLS = 2 * LANES;
// Floats of `right` that are packed at a time: 64 KiB, to stay in the second cache beside the weight that streams past.
// High ranks take more, because `left` is packed anew for every so many tiles.
constexpr int64_t PACKED = 16 << 10, FEWEST_TILES = 8;

// Products that are summed before their sum joins the total: rounding grows with the length of a run.
constexpr int64_t RUN = 128;

inline int64_t packed_cols(int64_t rank) {
  const int64_t tiles = PACKED / (TILE_COLS * (rank > 0 ? rank : 1));
  return TILE_COLS * (tiles > FEWEST_TILES ? tiles : FEWEST_TILES);
}

int64_t subtract_workspace(int64_t rank) { return (packed_cols(rank) + TILE_ROWS) * rank; }

// [cols / 16][rank][16], zeros beyond the last column
inline void pack_right(const pissa::Matrix& right, int64_t first, int64_t cols, float* packed) {
  for (int64_t j = 0; j < cols; j += TILE_COLS) {
    for (int64_t k = 0; k < right.rows; ++k) {
      const float* from = static_cast<const float*>(right.data) + k * right.row_stride + (first + j) * right.col_stride;
      for (int64_t c = 0; c < TILE_COLS; ++c) *packed++ = j + c < cols ? from[c * right.col_stride] : 0.0f;
    }
  }
}

// [rank][6], zeros beyond the last row
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
  f32x8 total[TILE_ROWS][2] = {};
  for (int64_t begin = 0; begin < rank; begin += RUN) {
    const int64_t end = rank - begin < RUN ? rank : begin + RUN;
    f32x8 sum[TILE_ROWS][2] = {};
    for (int64_t k = begin; k < end; ++k) {
      const f32x8 first = load<f32x8>(right + k * TILE_COLS), second = load<f32x8>(right + k * TILE_COLS + LANES);
#pragma GCC unroll 6
      for (int i = 0; i < TILE_ROWS; ++i) {
        sum[i][0] += left[k * TILE_ROWS + i] * first;
        sum[i][1] += left[k * TILE_ROWS + i] * second;
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < TILE_ROWS; ++i) {
      total[i][0] += sum[i][0];
      total[i][1] += sum[i][1];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < TILE_ROWS; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      typename T::Scalar* to = W + i * stride + half * LANES;
      const int64_t count = cols - half * LANES;
      if (count >= LANES) {
        store_narrow<T>(to, load_wide<T>(to) - scaling * total[i][half]);
      } else if (count > 0) {
        store_narrow<T>(to, load_wide<T>(to, count) - scaling * total[i][half], count);
      }
    }
  }
}

template <class T>
void subtract_lowrank(const pissa::Matrix& weight, const pissa::Matrix& left, const pissa::Matrix& right, float scaling,
                      int64_t begin, int64_t end, float* workspace) {
  const int64_t rank = left.cols, chunk = packed_cols(rank);
  float* const packed_left = workspace;
  float* const packed_right = workspace + TILE_ROWS * rank;
  for (int64_t first = 0; first < weight.cols; first += chunk) {
    const int64_t cols = weight.cols - first < chunk ? weight.cols - first : chunk;
    pack_right(right, first, cols, packed_right);
    for (int64_t row = begin; row < end; row += TILE_ROWS) {
      const int64_t rows = end - row < TILE_ROWS ? end - row : TILE_ROWS;
      pack_left(left, row, rows, packed_left);
      auto* W = static_cast<typename T::Scalar*>(weight.data) + row * weight.row_stride + first;
      for (int64_t j = 0; j < cols; j += TILE_COLS) {
        // the next rows, which are not where this one goes on
        for (int64_t i = TILE_ROWS; i < 2 * TILE_ROWS; ++i) __builtin_prefetch(W + i * weight.row_stride + j, 1);
        subtract_tile<T>(W + j, weight.row_stride, packed_left, packed_right + j * rank, rank, scaling, rows, cols - j);
      }
    }
  }
}

}  // namespace
