// W −= s·B·A on tiles, for factors that bfloat16 holds: those of an adapter that is stored in it.
#include "amx_vectors.h"

namespace pissa::cpu::amx {
namespace {

// Rows and columns of W whose product is computed at once, in tiles 0 to 3: whole cache lines of W.
constexpr int64_t BLOCK = 2 * TILE;
static_assert(BLOCK == SUBTRACT_ROWS, "as the caller splits the rows");

// To nearest, ties to even, with a quiet NaN for NaN. Not vcvtneps2bf16, which flushes subnormal numbers.
inline __m256i rounded(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value), upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(nearest, nan, upper, _mm512_set1_epi32(0x40)));
}

// 16 elements of W minus s times those of a product.
inline void subtract(uint16_t* W, __mmask16 mask, const float* product, __m512 scaling) {
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, W)), 16);
  const __m512 result = _mm512_fnmadd_ps(scaling, _mm512_load_ps(product), _mm512_castsi512_ps(bits));
  _mm256_mask_storeu_epi16(W, mask, rounded(result));
}

}  // namespace

Range range_of(const Matrix& matrix) {
  const auto* const data = static_cast<const uint32_t*>(matrix.data);
  const bool by_rows = matrix.row_stride >= matrix.col_stride;
  const int64_t outer = by_rows ? matrix.rows : matrix.cols, inner = by_rows ? matrix.cols : matrix.rows;
  const int64_t outer_stride = by_rows ? matrix.row_stride : matrix.col_stride;
  const int64_t stride = by_rows ? matrix.col_stride : matrix.row_stride;
  uint32_t below = 0, most = 0, least = 0x7f800000u;
  for (int64_t i = 0; i < outer; ++i) {
    const uint32_t* const line = data + i * outer_stride;
    const auto take = [&](uint32_t bits) {
      const uint32_t size = bits & 0x7fffffffu;
      below |= bits & 0xffffu;
      most = size > most ? size : most;
      least = size != 0 && size < least ? size : least;
    };
    if (stride == 1) {
      for (int64_t j = 0; j < inner; ++j) take(line[j]);
    } else {
      for (int64_t j = 0; j < inner; ++j) take(line[j * stride]);
    }
  }
  Range range;
  __builtin_memcpy(&range.largest, &most, sizeof(float));
  __builtin_memcpy(&range.smallest, &least, sizeof(float));
  range.is_bf16 = below == 0;
  return range;
}

void pack_rows(const Matrix& left, int64_t row, int64_t rows, uint16_t* out) {
  const int64_t steps = steps_of(left.cols);
  const __m512i offsets = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(static_cast<int>(left.col_stride)));
  for (int64_t i = 0; i < BLOCK; ++i) {
    const auto* const from = static_cast<const float*>(left.data) + (row + i) * left.row_stride;
    for (int64_t k = 0; k < steps * STEP; k += 16) {
      const __mmask16 mask = i < rows ? first16(left.cols - k) : 0;
      const float* const at = from + k * left.col_stride;
      const __m512 values = left.col_stride == 1
                                ? _mm512_maskz_loadu_ps(mask, at)
                                : _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, offsets, at, sizeof(float));
      // [step][tile of 16 rows][row][32 terms]
      uint16_t* const to = out + ((k / STEP * 2 + i / TILE) * TILE + i % TILE) * STEP + k % STEP;
      const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(values), 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(upper));
    }
  }
}

void subtract_rows(const Matrix& weight, int64_t row, int64_t rows, const uint16_t* left, const uint16_t* right,
                   int64_t rank, float scaling) {
  const int64_t steps = steps_of(rank), tiles = tiles_of(weight.cols);
  auto* const W = static_cast<uint16_t*>(weight.data) + row * weight.row_stride;
  const __m512 s = _mm512_set1_ps(scaling);
  alignas(64) float products[4][SUM_SIZE];
  for (int64_t tile = 0; tile < tiles; tile += 2) {
    // the next columns, which the hardware prefetcher does not expect of so many rows
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(W + i * weight.row_stride + (tile + 2) * TILE, 1);
    const uint16_t* const first = right + tile * steps * TILE_SIZE;
    const uint16_t* const second = tile + 1 < tiles ? first + steps * TILE_SIZE : first;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, left + step * 2 * TILE_SIZE, 64);
      _tile_loadd(5, left + (step * 2 + 1) * TILE_SIZE, 64);
      _tile_loadd(6, first + step * TILE_SIZE, 64);
      _tile_loadd(7, second + step * TILE_SIZE, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, products[0], 64);
    _tile_stored(1, products[1], 64);
    _tile_stored(2, products[2], 64);
    _tile_stored(3, products[3], 64);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t col = (tile + half) * TILE;
      const __mmask16 mask = first16(weight.cols - col);
      for (int64_t i = 0; i < rows; ++i)
        subtract(W + i * weight.row_stride + col, mask, products[i / TILE * 2 + half] + i % TILE * TILE, s);
    }
  }
}

}  // namespace pissa::cpu::amx
