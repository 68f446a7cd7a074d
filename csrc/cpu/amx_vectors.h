// What the kernels of amx.h share: AVX-512 vectors on their way to and from tiles.
//
// Only for files that are compiled with AMX and AVX-512. No inline function of the standard library may be used there: the
// linker would keep one copy of it for all files.
#pragma once

#include <immintrin.h>

#include "amx.h"

namespace pissa::cpu::amx {
namespace {

constexpr int64_t SUM_SIZE = TILE * TILE;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : (1u << (count > 0 ? count : 0)) - 1; }

inline __mmask32 first32(int64_t count) { return count >= 32 ? 0xffffffffu : (1u << (count > 0 ? count : 0)) - 1; }

// Transposes sixteen vectors of sixteen floats.
inline void transpose(__m512 (&v)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The column of W at place j of tile i of a group: unpacklo and unpackhi work on lanes of eight 16-bit elements, and four
// columns of a lane go to each.
constexpr int64_t column_of(int64_t group, int64_t i, int64_t j) {
  return group * GROUP + i / 2 * STEP + i % 2 * 4 + j / 4 * 8 + j % 4;
}

inline void load_sums(const float* from, __m512 (&rows)[16]) {
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) rows[j] = _mm512_loadu_ps(from + j * TILE);
}

}  // namespace
}  // namespace pissa::cpu::amx
