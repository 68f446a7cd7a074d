// W·X and Wᵀ·Y for narrow float32 panels and a weight with contiguous rows.
//
// A patch of W is widened into a float32 buffer that stays in the first cache and is multiplied from there. Both
// products then are one loop: elements of the patch, broadcast, times rows of the panel.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using pissa::cpu::BAND;
using pissa::cpu::Panel;
using pissa::cpu::SPAN;
using pissa::cpu::STRIPE;
using pissa::cpu::TILE;

// Products that are summed before their sum joins the total: rounding grows with the length of a run.
constexpr int64_t DEPTH = 128;
// Floats from row to row of the patch for W·X: at DEPTH its rows would share the cache's banks.
constexpr int64_t PITCH = DEPTH + LANES;

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

// out[i] += Σ_s patch[i·OUT + s·SUM]·panel[s] for the rows of a tile, which is held in registers.
template <int VECTORS, int64_t OUT, int64_t SUM>
inline void multiply_tile(const float* patch, const float* panel, int64_t count, float* out) {
  constexpr int ROWS = STRIPE / VECTORS, WIDTH = VECTORS * LANES;
  f32x8 sum[ROWS][VECTORS] = {};
  for (int64_t s = 0; s < count; ++s, patch += SUM, panel += WIDTH) {
    f32x8 row[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) row[v] = load<f32x8>(panel + v * LANES);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += patch[i * OUT] * row[v];
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* const to = out + i * WIDTH + v * LANES;
      store(to, load<f32x8>(to) + sum[i][v]);
    }
}

// STRIPE rows of `out`, from `out_row`, += those of the patch, for every tile of the panel's rows from `row`.
template <int64_t OUT, int64_t SUM>
inline void multiply_stripe(const float* patch, const Panel& panel, int64_t row, int64_t count, const Panel& out,
                            int64_t out_row) {
  for (int64_t tile = 0; tile < panel.columns; tile += TILE) {
    const float* const from = panel.data + tile * panel.rows;
    float* const to = out.data + tile * out.rows;
    if (panel.columns - tile > LANES) {
      multiply_tile<2, OUT, SUM>(patch, from + row * TILE, count, to + out_row * TILE);
      multiply_tile<2, OUT, SUM>(patch + STRIPE / 2 * OUT, from + row * TILE, count,
                                 to + (out_row + STRIPE / 2) * TILE);
    } else {
      multiply_tile<1, OUT, SUM>(patch, from + row * LANES, count, to + out_row * LANES);
    }
  }
}

template <class T>
void multiply(const pissa::Matrix& weight, int64_t row, int64_t rows, const Panel& X, const Panel& Y) {
  alignas(64) float patch[STRIPE * PITCH];
  for (int64_t i = 0; i < rows; i += STRIPE) {
    for (int64_t col = 0; col < weight.cols; col += DEPTH) {
      const int64_t depth = smaller(weight.cols - col, DEPTH);
      widen<T>(weight, row + i, col, smaller(rows - i, STRIPE), depth, STRIPE, depth, PITCH, patch);
      multiply_stripe<PITCH, 1>(patch, X, col, depth, Y, i);
    }
  }
}

template <class T>
void multiply_adjoint(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                      const Panel& Y, int64_t Y_row, const Panel& Z) {
  alignas(64) float patch[BAND * SPAN];
  for (int64_t col = begin; col < end; col += SPAN) {
    const int64_t cols = smaller(end - col, SPAN);
    widen<T>(weight, row, col, rows, cols, rows, SPAN, SPAN, patch);
    for (int64_t j = 0; j < cols; j += STRIPE) multiply_stripe<1, SPAN>(patch + j, Y, Y_row, rows, Z, col + j);
  }
}

}  // namespace
