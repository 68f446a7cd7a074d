// Products of a bfloat16 weight with float32 panels on Intel's AMX tiles.
//
// A tile product multiplies 16 rows of 32 bfloat16 numbers by 32 rows of 16, with float32 sums. The weight is exact as it
// is. A panel is split into one to three bfloat16 pieces, each the rest of the one before it, rounded to nearest: three
// hold a float32 number. Tiles flush subnormal numbers to zero, and a piece of a number near float32's largest may be
// Inf; amx_products.cpp checks the ranges.
//
// amx.cpp, amx_gram.cpp and amx_subtract.cpp are compiled for AMX, and this header is all that other files see of them.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace pissa::cpu::amx {

// Rows and columns of a tile of sums, terms of a tile product, elements of a tile in memory.
constexpr int64_t TILE = 16, STEP = 32, TILE_SIZE = 512;
// Tiles that are summed at once, and the rows (W·X) or columns (Wᵀ·Y) of W that they cover.
constexpr int64_t SUMS = 4, GROUP = SUMS * TILE;
// Most rows of W in a band: what they add to W·X and to Wᵀ·Y is computed at once.
constexpr int64_t BAND = 256;
constexpr int64_t BAND_STEPS = BAND / STEP;
constexpr int64_t MAX_PIECES = 3;

constexpr int64_t tiles_of(int64_t columns) { return (columns + TILE - 1) / TILE; }
constexpr int64_t steps_of(int64_t rows) { return (rows + STEP - 1) / STEP; }
constexpr int64_t band_steps(int64_t rows) { return (rows + GROUP - 1) / GROUP * (GROUP / STEP); }
constexpr int64_t groups_of(int64_t cols) { return (cols + GROUP - 1) / GROUP; }

// Whether the CPU has the instructions, and the kernel lets this process use them.
bool available();

// Tiles of this thread are set up while an object exists.
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

// out[tile][step][piece][16 pairs of rows][16 columns][2] = the pieces of X (n, k), for steps [begin, end).
void pack(const Matrix& X, int64_t pieces, int64_t begin, int64_t end, uint16_t* out);

// Y[tile][BAND][16] = W[row : row + rows]·X for at most BAND rows of a weight with contiguous rows. Y has room for two
// bands, and its second half is overwritten.
void multiply(const Matrix& weight, int64_t row, int64_t rows, const uint16_t* X, int64_t pieces, int64_t tiles, float* Y);

// V[group][step][SUMS][16 pairs of rows][16 columns][2] = at most BAND rows of W from `row` on, padded with zeros to
// band_steps(rows), for the groups [begin, end) of its columns. The columns are in the order of unpack().
void interleave(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, uint16_t* V);

// Y[tile][BAND][16] = rows [row, row + rows) of a strided float32 matrix (m, k), with zeros up to band_steps(rows).
void load_band(const Matrix& matrix, int64_t row, int64_t rows, float* Y);

// out[tile][BAND_STEPS][piece][16 columns][32 rows] = the pieces of a band Y[tile][BAND][16].
void pack_band(const float* Y, int64_t rows, int64_t pieces, int64_t tiles, uint16_t* out);

// Z[group][tile][SUMS][16 columns of Y][16 columns of W] += (WᵀY)ᵀ for an interleaved band of rows and `groups` groups of
// columns of W, and the packed band of Y.
void multiply_adjoint(const uint16_t* V, int64_t rows, int64_t groups, const uint16_t* Y, int64_t pieces, int64_t tiles,
                      float* Z);

// The groups [begin, end) of Z, `tiles` wide, into rows of a contiguous matrix (n, k).
void unpack(const float* Z, int64_t begin, int64_t end, int64_t tiles, const Matrix& out);

// out[tile][BAND_STEPS][16 columns][32 rows] = the first `groups` groups of an interleaved band, transposed: columns of W
// in the place of those of Y, for multiply_adjoint() in one piece.
void transpose_band(const uint16_t* V, int64_t rows, int64_t groups, uint16_t* out);

// The same two operands for W·Wᵀ: at most BAND columns of W from `col` on, for the first `groups` groups of rows, which
// keep their order.
void pack_columns(const Matrix& weight, int64_t col, int64_t cols, int64_t groups, uint16_t* V, uint16_t* out);

// Z[tile][SUMS][16][16], a group of sums with the tiles of this group and of those before it, into the rows and columns of
// a contiguous symmetric matrix. `ordered`: whether the operands were packed by pack_columns().
void unpack_symmetric(const float* Z, int64_t group, bool ordered, const Matrix& out);

// Rows of a weight from which a product is subtracted at once.
constexpr int64_t SUBTRACT_ROWS = 2 * TILE;

// The largest and the smallest nonzero absolute value of a strided float32 matrix, where there is one, and whether bfloat16
// holds every value. A NaN or an Inf is the largest.
struct Range {
  float largest, smallest;
  bool is_bf16;
};
Range range_of(const Matrix& matrix);

// The operand of subtract_rows(): rows [row, row + rows) of `left` (m, rank), whose values bfloat16 holds, padded with
// zeros to SUBTRACT_ROWS rows and whole steps.
void pack_rows(const Matrix& left, int64_t row, int64_t rows, uint16_t* out);

// W[row : row + rows] −= s·left·right for a weight with contiguous rows: a float32 sum, one rounding. `left` is from
// pack_rows(), `right` (rank, n) from pack() in one piece.
void subtract_rows(const Matrix& weight, int64_t row, int64_t rows, const uint16_t* left, const uint16_t* right,
                   int64_t rank, float scaling);

}  // namespace pissa::cpu::amx
