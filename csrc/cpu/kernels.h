// The CPU kernels. kernels.cpp is compiled once per instruction set; isa.h chooses one for this CPU.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace pissa::cpu {

// Rows of a product that are computed together: two register tiles of 6 × 16 (one of 12 × 16 with AVX-512), or one of
// 12 × 8.
constexpr int64_t STRIP_ROWS = 12;
// Columns of W in a block, hence rows of Wᵀ·Y that it contributes to. A block stays in L1.
constexpr int64_t BLOCK_COLS = 8 * STRIP_ROWS;
// Rows of W in a block. `normal` reads them once: it computes their part of W·X and then, while they are in cache, adds
// to Wᵀ·Y. With 60 rows there are more streams than the hardware prefetcher follows, and Wᵀ·Y of a weight in main
// memory takes a quarter longer.
constexpr int64_t BLOCK_ROWS = 2 * STRIP_ROWS;
// Columns in a tile of a packed panel; HALF_TILE in the last tile where no more are left.
constexpr int64_t TILE = 16, HALF_TILE = 8;

// How a panel is packed. The last two are for HALF_TILE columns and pad the rows to a multiple of 32, the number of
// 16-bit elements in a cache line.
enum class Layout {
  tiles,          // [tile][row][TILE or HALF_TILE]; a tile begins at its first column · rows
  transposed,     // [row / 8][column][row % 8]
  deinterleaved,  // [row / 16][row % 2][column][row % 16 / 2]: even rows, then odd ones, as 16 bfloat16 are widened
};

// A packed float32 panel, with a multiple of HALF_TILE columns. Those from `used` on are padding.
struct Panel {
  float* data;
  int64_t rows, columns;
  Layout layout;
  int64_t used;
};

// Sixteen values, in ascending order: what lies between two neighbors, and the code of each.
constexpr int MIDPOINTS = 15;
struct Table {
  float midpoints[MIDPOINTS];
  uint8_t codes[MIDPOINTS + 1];
};

struct Kernels {
  const char* name;  // of the instruction set

  // out = weightᵀ for rows [begin, end) of `out`, which is contiguous.
  void (*transpose_cast)(const Matrix& weight, const Matrix& out, int64_t begin, int64_t end);

  // weight −= s·left·right for rows [begin, end) of a weight with contiguous rows: float32 sums, one rounding.
  // `workspace` has subtract_workspace(rank) floats.
  void (*subtract_lowrank)(const Matrix& weight, const Matrix& left, const Matrix& right, float scaling, int64_t begin,
                           int64_t end, float* workspace);
  int64_t (*subtract_workspace)(int64_t rank);

  // Y[0 : rows] += W[row : row + rows, begin : end]·X[begin : end] for a W with contiguous rows. `begin` is a multiple
  // of 32, and the rows of Y are padded to whole strips. X, and Z below, have the layout of layout_along_rows(), Y that
  // of tiles.
  void (*multiply)(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const Panel& X,
                   const Panel& Y);
  // Z[begin : end] += W[row : row + rows, begin : end]ᵀ·Y[Y_row : Y_row + rows] for at most BLOCK_ROWS rows. `begin` is
  // a multiple of BLOCK_COLS, and the rows of Z are padded to whole strips.
  void (*multiply_adjoint)(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const Panel& Y,
                           int64_t Y_row, const Panel& Z);

  // sums[i] = the sum of squares of row i, for rows [begin, end) of a weight with contiguous rows.
  void (*sum_of_squares)(const Matrix& weight, int64_t begin, int64_t end, double* sums);

  // Codes, two in each byte, and scales of blocks [begin, end) of `count` values; a block is a multiple of 32 values.
  void (*quantize_blocks)(const float* values, int64_t count, const Table& table, int64_t block, int64_t begin,
                          int64_t end, uint8_t* codes, float* scales);

  // For a transposed panel P of eight columns: its Gram matrix PᵀP (8, 8), and P = P·M in place with an upper
  // triangular M (8, 8), both row-major.
  void (*gram)(const Panel& panel, double* gram);
  void (*transform)(const Panel& panel, const float* M);
};

}  // namespace pissa::cpu
