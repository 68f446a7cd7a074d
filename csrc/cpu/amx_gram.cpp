// The operands and the result of a Gram matrix on tiles.
#include "amx_vectors.h"

namespace pissa::cpu::amx {

void transpose_band(const uint16_t* V, int64_t rows, int64_t groups, uint16_t* out) {
  const int64_t steps = band_steps(rows);
  for (int64_t tile = 0; tile < groups * SUMS; ++tile) {
    for (int64_t step = 0; step < steps; ++step) {
      // a pair of rows is one 32-bit number
      __m512 pairs[16];
      load_sums(reinterpret_cast<const float*>(V + ((tile / SUMS * steps + step) * SUMS + tile % SUMS) * TILE_SIZE), pairs);
      transpose(pairs);
      uint16_t* const to = out + (tile * BAND_STEPS + step) * TILE_SIZE;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * STEP, pairs[i]);
    }
  }
}

void pack_columns(const Matrix& weight, int64_t col, int64_t cols, int64_t groups, uint16_t* V, uint16_t* out) {
  const int64_t steps = band_steps(cols);
  for (int64_t tile = 0; tile < groups * SUMS; ++tile) {
    for (int64_t step = 0; step < steps; ++step) {
      const __mmask32 mask = first32(cols - step * STEP);
      const auto* const from = static_cast<const uint16_t*>(weight.data) + col + step * STEP;
      uint16_t* const to = out + (tile * BAND_STEPS + step) * TILE_SIZE;
      __m512 rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t row = tile * TILE + i;
        rows[i] = _mm512_castsi512_ps(
            _mm512_maskz_loadu_epi16(row < weight.rows ? mask : 0, from + row * weight.row_stride));
        _mm512_storeu_ps(to + i * STEP, rows[i]);
      }
      transpose(rows);
      uint16_t* const v = V + ((tile / SUMS * steps + step) * SUMS + tile % SUMS) * TILE_SIZE;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(v + i * STEP, rows[i]);
    }
  }
}

void unpack_symmetric(const float* Z, int64_t group, bool ordered, const Matrix& out) {
  const int64_t n = out.rows;
  float* const data = static_cast<float*>(out.data);
  // place k of tile i of a group; four places that follow a multiple of four are adjacent
  const auto place = [&](int64_t in_group, int64_t i, int64_t k) {
    return ordered ? in_group * GROUP + i * TILE + k : column_of(in_group, i, k);
  };
  const auto store = [&](const __m512(&rows)[16], int64_t row_tile, int64_t col_tile) {
    for (int64_t k = 0; k < TILE; ++k) {
      const int64_t row = place(row_tile / SUMS, row_tile % SUMS, k);
      if (row >= n) continue;
      alignas(64) float values[16];
      _mm512_store_ps(values, rows[k]);
      for (int64_t j = 0; j < TILE; j += 4) {
        const int64_t col = place(col_tile / SUMS, col_tile % SUMS, j);
        _mm_mask_storeu_ps(data + row * n + col, first16(smaller(n - col, 4)), _mm_load_ps(values + j));
      }
    }
  };
  for (int64_t tile = 0; tile < (group + 1) * SUMS; ++tile) {
    for (int64_t i = 0; i < SUMS; ++i) {
      __m512 rows[16];
      load_sums(Z + (tile * SUMS + i) * SUM_SIZE, rows);
      store(rows, tile, group * SUMS + i);
      transpose(rows);
      store(rows, group * SUMS + i, tile);
    }
  }
}

}  // namespace pissa::cpu::amx
