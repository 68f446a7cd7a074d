// Products of a bfloat16 weight with float32 panels on Intel's AMX tiles.
//
// A tile product multiplies 16 rows of 32 bfloat16 numbers by 32 rows of 16, with float32 sums. The weight is exact as it
// is. A panel is split into one to three bfloat16 pieces, each the rest of the one before it, rounded to nearest: three
// hold a float32 number. Tiles flush subnormal numbers to zero, and a piece of a number near float32's largest may be
// Inf; amx_products.cpp checks the ranges.
//
// amx.cpp is compiled for AMX, and this header is all that other files see of it.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace pissa::cpu::amx {

// Rows and columns of a tile of sums, terms of a tile product, elements of a tile in memory.
constexpr int64_t TILE = 16, STEP = 32, TILE_SIZE = 512;
// Tiles that are summed at once, and the rows (W·X) or columns (Wᵀ·Y) of W that they cover.
constexpr int64_t SUMS = 4, GROUP = SUMS * TILE;
// Rows of W in a band. They are read for W·X, and again, from cache, for Wᵀ·Y.
constexpr int64_t BAND = 256;
constexpr int64_t BAND_STEPS = BAND / STEP;
constexpr int64_t MAX_PIECES = 3;

constexpr int64_t tiles_of(int64_t columns) { return (columns + TILE - 1) / TILE; }
constexpr int64_t steps_of(int64_t rows) { return (rows + STEP - 1) / STEP; }
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

// Y[tile][BAND][16] = W[row : row + rows]·X for at most BAND rows of a weight with contiguous rows.
void multiply(const Matrix& weight, int64_t row, int64_t rows, const uint16_t* X, int64_t pieces, int64_t tiles,
              float* Y);

// Y[tile][BAND][16] = rows [row, row + rows) of a strided float32 matrix (m, k), with zeros up to a whole step.
void load_band(const Matrix& matrix, int64_t row, int64_t rows, float* Y);

// out[tile][step of BAND][piece][16 columns][32 rows] = the pieces of a band Y[tile][BAND][16].
void pack_band(const float* Y, int64_t rows, int64_t pieces, int64_t tiles, uint16_t* out);

// Z[group][tile][SUMS][16 columns of Y][16 columns of W] += (W[row : row + rows]ᵀ·Y)ᵀ for the groups [begin, end) of W's
// columns, and Y a packed band of these rows. Columns of W are in the order of unpack().
void multiply_adjoint(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const uint16_t* Y,
                      int64_t pieces, int64_t tiles, float* Z);

// The groups [begin, end) of Z, `tiles` wide, into rows of a contiguous matrix (n, k).
void unpack(const float* Z, int64_t begin, int64_t end, int64_t tiles, const Matrix& out);

}  // namespace pissa::cpu::amx
