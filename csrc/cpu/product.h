// W·X and Wᵀ·Y for a weight with contiguous rows.
//
// Both are one loop over a widened patch: its elements, broadcast, times rows of the panel.
#pragma once

#include "narrow.h"
#include "patch.h"

namespace {

using pissa::cpu::Order;
using pissa::cpu::TILE;

// Products that are summed before their sum joins the total: rounding grows with the length of a run.
constexpr int64_t DEPTH = 128;
// Floats from row to row of the patch for W·X: at DEPTH its rows would share the cache's banks.
constexpr int64_t PITCH = DEPTH + LANES;

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
void multiply(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const Panel& X,
              const Panel& Y) {
  if (X.order != Order::tiles) return multiply_narrow<T>(weight, row, rows, begin, end, X, Y);
  alignas(64) float patch[STRIPE * PITCH];
  for (int64_t i = 0; i < rows; i += STRIPE) {
    for (int64_t col = begin; col < end; col += DEPTH) {
      const int64_t depth = smaller(end - col, DEPTH);
      widen<T>(weight, row + i, col, smaller(rows - i, STRIPE), depth, STRIPE, depth, PITCH, patch);
      multiply_stripe<PITCH, 1>(patch, X, col, depth, Y, i);
    }
  }
}

template <class T>
void multiply_adjoint(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                      const Panel& Y, int64_t Y_row, const Panel& Z) {
  if (Z.order != Order::tiles) return multiply_adjoint_narrow<T>(weight, row, rows, begin, end, Y, Y_row, Z);
  for_patches<T>(weight, row, rows, begin, end, [&](const float* patch, int64_t col) {
    multiply_stripe<1, SPAN>(patch, Y, Y_row, rows, Z, col);
  });
}

}  // namespace
