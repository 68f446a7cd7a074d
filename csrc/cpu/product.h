// W·X and Wᵀ·Y for a weight with contiguous rows.
//
// Both use one register-tile kernel: elements of a widened block of W, broadcast, times rows of a tile of the panel.
#pragma once

#include "block.h"
#include "narrow.h"

namespace {

using pissa::cpu::Layout;
using pissa::cpu::TILE;

// Products in one partial sum, which is held in registers: rounding errors grow with the length of a sum.
constexpr int64_t DEPTH = 128;
// Floats between rows of the block for W·X. With DEPTH, reads down a column would conflict in the banks of the cache.
constexpr int64_t PITCH = DEPTH + LANES;

// out[i] += Σ_s block[i·OUT + s·SUM]·panel[s] for ROWS rows of VECTORS vectors, a register tile.
template <class Vector, int VECTORS, int ROWS, int64_t OUT, int64_t SUM>
inline void multiply_tile(const float* block, const float* panel, int64_t count, float* out) {
  constexpr int SIZE = sizeof(Vector) / sizeof(float), WIDTH = VECTORS * SIZE;
  Vector sum[ROWS][VECTORS] = {};
  for (int64_t s = 0; s < count; ++s, block += SUM, panel += WIDTH) {
    Vector row[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) row[v] = load<Vector>(panel + v * SIZE);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += block[i * OUT] * row[v];
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* const to = out + i * WIDTH + v * SIZE;
      store(to, load<Vector>(to) + sum[i][v]);
    }
}

// STRIP_ROWS rows of `out`, from `out_row` on, += block·(`count` rows of the panel, from `row` on), tile by tile.
template <int64_t OUT, int64_t SUM>
inline void multiply_strip(const float* block, const Panel& panel, int64_t row, int64_t count, const Panel& out,
                           int64_t out_row) {
  for (int64_t tile = 0; tile < panel.columns; tile += TILE) {
    const float* const from = panel.data + tile * panel.rows;
    float* const to = out.data + tile * out.rows;
    if (panel.columns - tile <= LANES) {
      multiply_tile<f32x8, 1, STRIP_ROWS, OUT, SUM>(block, from + row * LANES, count, to + out_row * LANES);
      continue;
    }
#if defined(__AVX512F__)
    multiply_tile<f32x16, 1, STRIP_ROWS, OUT, SUM>(block, from + row * TILE, count, to + out_row * TILE);
#else
    constexpr int HALF_STRIP = STRIP_ROWS / 2;
    for (int64_t i = 0; i < STRIP_ROWS; i += HALF_STRIP)
      multiply_tile<f32x8, 2, HALF_STRIP, OUT, SUM>(block + i * OUT, from + row * TILE, count,
                                                    to + (out_row + i) * TILE);
#endif
  }
}

template <class T>
void multiply(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const Panel& X,
              const Panel& Y) {
  if (X.layout != Layout::tiles) {
    const auto narrow = X.used <= HALF ? multiply_narrow<T, HALF> : multiply_narrow<T, COLUMNS>;
    return narrow(weight, row, rows, begin, end, X, Y);
  }
  alignas(LINE_BYTES) float block[STRIP_ROWS * PITCH];
  for (int64_t i = 0; i < rows; i += STRIP_ROWS) {
    for (int64_t col = begin; col < end; col += DEPTH) {
      const int64_t depth = smaller(end - col, DEPTH);
      widen_block<T>(weight, row + i, col, smaller(rows - i, STRIP_ROWS), depth, STRIP_ROWS, depth, PITCH, block);
      multiply_strip<PITCH, 1>(block, X, col, depth, Y, i);
    }
  }
}

template <class T>
void multiply_adjoint(const pissa::Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                      const Panel& Y, int64_t Y_row, const Panel& Z) {
  if (Z.layout != Layout::tiles) {
    const auto narrow = Z.used <= HALF ? multiply_adjoint_narrow<T, HALF> : multiply_adjoint_narrow<T, COLUMNS>;
    return narrow(weight, row, rows, begin, end, Y, Y_row, Z);
  }
  for_strips<T>(weight, row, rows, begin, end, [&](const float* strip, int64_t col) {
    multiply_strip<1, BLOCK_COLS>(strip, Y, Y_row, rows, Z, col);
  });
}

}  // namespace
