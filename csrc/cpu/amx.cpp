// The kernels of amx.h, but for those of Gram matrices.
#include "amx_vectors.h"

#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pissa::cpu::amx {
namespace {

// Columns of W whose products are summed in tiles before they are added in memory: rounding errors grow with the length
// of a sum, and 64 rows of so many columns stay in L1.
constexpr int64_t RUN = 256;
// Columns whose sums are added in memory before they are added to those of the columns before them.
constexpr int64_t SUM_COLS = 8 * RUN;

// The next piece of sixteen numbers, which keep the rest.
inline __m256i take_piece(__m512& values) {
  const __m256i piece = (__m256i)_mm512_cvtneps_pbh(values);
  values = _mm512_sub_ps(values, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(piece), 16)));
  return piece;
}

// Up to 16 elements of a row of a float32 matrix, followed by zeros; zeros where the matrix has no such row.
inline __m512 load_row(const Matrix& X, int64_t row, int64_t col) {
  if (row >= X.rows) return _mm512_setzero_ps();
  const float* const from = static_cast<const float*>(X.data) + row * X.row_stride + col * X.col_stride;
  const __mmask16 mask = first16(X.cols - col);
  if (X.col_stride == 1) return _mm512_maskz_loadu_ps(mask, from);
  alignas(64) float values[16] = {};
  for (int64_t j = 0; j < smaller(X.cols - col, 16); ++j) values[j] = from[j * X.col_stride];
  return _mm512_load_ps(values);
}

// sums[i] += tile i, for the tiles 0 to 3.
inline void add_sums(float* const (&sums)[SUMS]) {
  alignas(64) float tile[SUMS][SUM_SIZE];
  _tile_stored(0, tile[0], 64);
  _tile_stored(1, tile[1], 64);
  _tile_stored(2, tile[2], 64);
  _tile_stored(3, tile[3], 64);
  for (int64_t i = 0; i < SUMS; ++i)
    for (int64_t j = 0; j < SUM_SIZE; j += 16)
      _mm512_storeu_ps(sums[i] + j, _mm512_add_ps(_mm512_loadu_ps(sums[i] + j), _mm512_load_ps(tile[i] + j)));
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Tiles 5 to 7 = the pieces, one after another in memory.
template <int PIECES>
inline __attribute__((always_inline)) void load_pieces(const uint16_t* pieces) {
  _tile_loadd(5, pieces, 64);
  if constexpr (PIECES > 1) _tile_loadd(6, pieces + TILE_SIZE, 64);
  if constexpr (PIECES > 2) _tile_loadd(7, pieces + 2 * TILE_SIZE, 64);
}

// 64 rows of W over `steps` steps, times a packed tile of X.
template <int PIECES>
inline void multiply_group(const uint16_t* W, int64_t stride, int64_t steps, const uint16_t* X, float* const (&Y)[SUMS]) {
  zero_sums();
  for (int64_t s = 0; s < steps; ++s, X += PIECES * TILE_SIZE, W += STEP) {
    load_pieces<PIECES>(X);
#define PISSA_ROWS(i)                                        \
  _tile_loadd(4, W + (i) * TILE * stride, stride * 2);       \
  _tile_dpbf16ps(i, 4, 5);                                   \
  if constexpr (PIECES > 1) _tile_dpbf16ps(i, 4, 6);         \
  if constexpr (PIECES > 2) _tile_dpbf16ps(i, 4, 7);
    PISSA_ROWS(0) PISSA_ROWS(1) PISSA_ROWS(2) PISSA_ROWS(3)
#undef PISSA_ROWS
  }
  add_sums(Y);
}

// 64 rows of W over at most RUN columns into a block of 64 × RUN, padded with zeros to 64 rows and to whole steps: rows of W
// are often a power of two apart, so that their lines would evict each other before they are used again.
inline void copy_block(const uint16_t* W, int64_t stride, int64_t rows, int64_t cols, uint16_t* block) {
  for (int64_t row = 0; row < GROUP; ++row, W += stride) {
    const __mmask32 inside = row < rows ? 0xffffffffu : 0;
    for (int64_t col = 0; col < cols; col += STEP)
      _mm512_store_si512(block + row * RUN + col, _mm512_maskz_loadu_epi16(inside & first32(cols - col), W + col));
  }
}

// The same columns interleaved into V (see interleave()), padded with zeros to 64 rows and to whole groups.
inline void interleave_block(const uint16_t* W, int64_t stride, int64_t rows, int64_t cols, uint16_t* V, int64_t V_steps) {
  for (int64_t pair = 0; pair < GROUP / 2; ++pair, W += 2 * stride) {
    const __mmask32 even = 2 * pair < rows ? 0xffffffffu : 0, odd = 2 * pair + 1 < rows ? 0xffffffffu : 0;
    for (int64_t col = 0; col < cols; col += STEP) {
      const __mmask32 mask = first32(cols - col);
      const __m512i a = _mm512_maskz_loadu_epi16(even & mask, W + col);
      const __m512i b = _mm512_maskz_loadu_epi16(odd & mask, W + stride + col);
      uint16_t* const to = V + ((col / GROUP * V_steps + pair / TILE) * SUMS + col % GROUP / TILE) * TILE_SIZE;
      _mm512_store_si512(to + pair % TILE * STEP, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + TILE_SIZE + pair % TILE * STEP, _mm512_unpackhi_epi16(a, b));
    }
  }
  if (cols % GROUP == 0 || cols % GROUP > STEP) return;
  for (int64_t step = 0; step < GROUP / STEP; ++step) {  // the second half of the last group
    uint16_t* const to = V + ((cols / GROUP * V_steps + step) * SUMS + SUMS / 2) * TILE_SIZE;
    for (int64_t i = 0; i < SUMS / 2 * TILE_SIZE; i += STEP) _mm512_store_si512(to + i, _mm512_setzero_si512());
  }
}

template <int PIECES>
void multiply_pieces(const Matrix& weight, int64_t row, int64_t rows, const uint16_t* X, int64_t tiles, float* Y) {
  const int64_t all_steps = steps_of(weight.cols);
  alignas(64) uint16_t block[GROUP * RUN];
  float* const scratch = Y + tiles * BAND * TILE;
  const auto for_vectors = [&](const auto& f) {
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t i = 0; i < band_steps(rows) * STEP * TILE; i += 16) f(tile * BAND * TILE + i);
  };
  for_vectors([&](int64_t at) { _mm512_storeu_ps(Y + at, _mm512_setzero_ps()); });
  for (int64_t col = 0; col < weight.cols; col += RUN) {
    float* const total = col < SUM_COLS ? Y : scratch;
    if (col >= SUM_COLS && col % SUM_COLS == 0)
      for_vectors([&](int64_t at) { _mm512_storeu_ps(scratch + at, _mm512_setzero_ps()); });
    const int64_t cols = smaller(RUN, weight.cols - col), steps = steps_of(cols);
    for (int64_t group = 0; group < rows; group += GROUP) {
      const uint16_t* W = static_cast<const uint16_t*>(weight.data) + (row + group) * weight.row_stride + col;
      int64_t stride = weight.row_stride;
      if (rows - group < GROUP || cols % STEP != 0 || tiles > 1) {
        copy_block(W, stride, rows - group, cols, block);
        W = block;
        stride = RUN;
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        float* const y = total + (tile * BAND + group) * TILE;
        float* const sums[SUMS] = {y, y + SUM_SIZE, y + 2 * SUM_SIZE, y + 3 * SUM_SIZE};
        multiply_group<PIECES>(W, stride, steps, X + (tile * all_steps + col / STEP) * PIECES * TILE_SIZE, sums);
      }
    }
    if (total == scratch && ((col + RUN) % SUM_COLS == 0 || col + RUN >= weight.cols))
      for_vectors([&](int64_t at) {
        _mm512_storeu_ps(Y + at, _mm512_add_ps(_mm512_loadu_ps(Y + at), _mm512_loadu_ps(scratch + at)));
      });
  }
}

template <int PIECES>
void adjoint_pieces(const uint16_t* V, int64_t steps, int64_t groups, const uint16_t* Y, int64_t tiles, float* Z) {
  for (int64_t group = 0; group < groups; ++group, V += steps * SUMS * TILE_SIZE) {
    for (int64_t tile = 0; tile < tiles; ++tile, Z += SUMS * SUM_SIZE) {
      zero_sums();
      const uint16_t* y = Y + tile * BAND_STEPS * PIECES * TILE_SIZE;
      for (int64_t s = 0; s < steps; ++s, y += PIECES * TILE_SIZE) {
        load_pieces<PIECES>(y);
#define PISSA_COLUMNS(i)                                     \
  _tile_loadd(4, V + (s * SUMS + (i)) * TILE_SIZE, 64);      \
  _tile_dpbf16ps(i, 5, 4);                                   \
  if constexpr (PIECES > 1) _tile_dpbf16ps(i, 6, 4);         \
  if constexpr (PIECES > 2) _tile_dpbf16ps(i, 7, 4);
        PISSA_COLUMNS(0) PISSA_COLUMNS(1) PISSA_COLUMNS(2) PISSA_COLUMNS(3)
#undef PISSA_COLUMNS
      }
      float* const sums[SUMS] = {Z, Z + SUM_SIZE, Z + 2 * SUM_SIZE, Z + 3 * SUM_SIZE};
      add_sums(sums);
    }
  }
}

bool cpu_has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  const unsigned tiles = 1u << 22 | 1u << 24;                         // AMX-BF16, AMX-TILE
  if ((b & avx512) != avx512 || (d & tiles) != tiles) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);  // AVX512-BF16
}

// The state of the tiles is large, so Linux asks a process to request it.
bool kernel_permits() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
  return false;
#endif
}

// Eight tiles of 16 rows of 64 bytes. A constant in memory, because GCC's intrinsic reads the first eight bytes only as far
// as the optimizer knows.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");
constexpr TileConfig CONFIG;

}  // namespace

bool available() {
  static const bool found = cpu_has_amx() && kernel_permits();
  return found;
}

Session::Session() { _tile_loadconfig(&CONFIG); }

Session::~Session() { _tile_release(); }

void pack(const Matrix& X, int64_t pieces, int64_t begin, int64_t end, uint16_t* out) {
  const int64_t steps = steps_of(X.rows);
  for (int64_t tile = 0; tile < tiles_of(X.cols); ++tile) {
    for (int64_t step = begin; step < end; ++step) {
      uint16_t* const to = out + (tile * steps + step) * pieces * TILE_SIZE;
      for (int64_t pair = 0; pair < TILE; ++pair) {
        const int64_t row = step * STEP + 2 * pair;
        __m512 even = load_row(X, row, tile * TILE), odd = load_row(X, row + 1, tile * TILE);
        for (int64_t p = 0; p < pieces; ++p) {
          const __m512i low = _mm512_cvtepu16_epi32(take_piece(even)), high = _mm512_cvtepu16_epi32(take_piece(odd));
          _mm512_storeu_si512(to + p * TILE_SIZE + pair * STEP, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
      }
    }
  }
}

void load_band(const Matrix& matrix, int64_t row, int64_t rows, float* Y) {
  for (int64_t tile = 0; tile < tiles_of(matrix.cols); ++tile)
    for (int64_t i = 0; i < band_steps(rows) * STEP; ++i)
      _mm512_storeu_ps(Y + (tile * BAND + i) * TILE,
                       i < rows ? load_row(matrix, row + i, tile * TILE) : _mm512_setzero_ps());
}

void pack_band(const float* Y, int64_t rows, int64_t pieces, int64_t tiles, uint16_t* out) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t row = 0; row < band_steps(rows) * STEP; row += TILE) {
      __m512 columns[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) columns[i] = _mm512_loadu_ps(Y + (tile * BAND + row + i) * TILE);
      transpose(columns);
      uint16_t* const to = out + (tile * BAND_STEPS + row / STEP) * pieces * TILE_SIZE + row % STEP;
      for (int64_t p = 0; p < pieces; ++p)
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p * TILE_SIZE + i * STEP), take_piece(columns[i]));
    }
  }
}

void multiply(const Matrix& weight, int64_t row, int64_t rows, const uint16_t* X, int64_t pieces, int64_t tiles, float* Y) {
  if (pieces == 1) return multiply_pieces<1>(weight, row, rows, X, tiles, Y);
  if (pieces == 2) return multiply_pieces<2>(weight, row, rows, X, tiles, Y);
  return multiply_pieces<3>(weight, row, rows, X, tiles, Y);
}

void interleave(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, uint16_t* V) {
  const int64_t steps = band_steps(rows), last = smaller(end * GROUP, weight.cols);
  for (int64_t col = begin * GROUP; col < last; col += RUN) {
    for (int64_t group = 0; group < rows; group += GROUP) {
      const uint16_t* W = static_cast<const uint16_t*>(weight.data) + (row + group) * weight.row_stride + col;
      uint16_t* const v = V + ((col / GROUP - begin) * steps + group / STEP) * SUMS * TILE_SIZE;
      interleave_block(W, weight.row_stride, rows - group, smaller(RUN, last - col), v, steps);
    }
  }
}

void multiply_adjoint(const uint16_t* V, int64_t rows, int64_t groups, const uint16_t* Y, int64_t pieces, int64_t tiles,
                      float* Z) {
  const int64_t steps = band_steps(rows);
  if (pieces == 1) return adjoint_pieces<1>(V, steps, groups, Y, tiles, Z);
  if (pieces == 2) return adjoint_pieces<2>(V, steps, groups, Y, tiles, Z);
  return adjoint_pieces<3>(V, steps, groups, Y, tiles, Z);
}

void unpack(const float* Z, int64_t begin, int64_t end, int64_t tiles, const Matrix& out) {
  for (int64_t group = begin; group < end; ++group) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const __mmask16 mask = first16(out.cols - tile * TILE);
      for (int64_t i = 0; i < SUMS; ++i) {
        __m512 rows[16];
        load_sums(Z + ((group * tiles + tile) * SUMS + i) * SUM_SIZE, rows);
        transpose(rows);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          const int64_t row = column_of(group, i, j);
          float* const to = static_cast<float*>(out.data) + row * out.cols + tile * TILE;
          if (row < out.rows) _mm512_mask_storeu_ps(to, mask, rows[j]);
        }
      }
    }
  }
}

}  // namespace pissa::cpu::amx
