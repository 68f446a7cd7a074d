// The bodies for CPUs. kernels.cpp is compiled once per instruction set; kernels() picks the best that the CPU has.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace pissa::cpu {

// Rows of a product that are computed at a time.
constexpr int64_t STRIPE = 12;
// Columns of W, or rows of Wᵀ·Y, whose elements are in the first cache at a time: stripes, and vectors.
constexpr int64_t SPAN = 8 * STRIPE;
// Rows of W that are multiplied from one side and then from the other while they are in the caches. With more of them
// side by side (60) the prefetcher loses track, and Wᵀ·Y of a weight in memory takes a quarter longer.
constexpr int64_t BAND = 2 * STRIPE;
// Columns of a packed panel that lie together; the last eight alone, if they are no more.
constexpr int64_t TILE = 16, HALF_TILE = 8;

// How the elements of a panel lie. The last two are of HALF_TILE columns and a multiple of 32 rows, what a line of 16-bit
// elements holds.
enum class Order {
  tiles,    // [tile][row][TILE or HALF_TILE], a tile beginning at its first column · rows
  turned,   // [row / 8][column][row % 8]
  parted,   // [row / 16][row % 2][column][row % 16 / 2], as sixteen bfloat16 come apart into two vectors of floats
};

// A float32 matrix that kernels multiply, with a multiple of HALF_TILE columns.
struct Panel {
  float* data;
  int64_t rows, columns;
  Order order;
};

struct Kernels {
  const char* name;  // the instruction set

  // out = weightᵀ for the rows [begin, end) of `out`, which is contiguous.
  void (*transpose_cast)(const Matrix& weight, const Matrix& out, int64_t begin, int64_t end);

  // weight −= s·left·right for the rows [begin, end) of a row-contiguous weight, float32 sums, one rounding.
  // `workspace` has subtract_workspace(rank) floats.
  void (*subtract_lowrank)(const Matrix& weight, const Matrix& left, const Matrix& right, float scaling, int64_t begin,
                           int64_t end, float* workspace);
  int64_t (*subtract_workspace)(int64_t rank);

  // Rows [0, rows) of Y += W[row : row + rows, begin : end]·X[begin : end], W with contiguous rows; `begin` is a multiple
  // of 32, and Y has whole stripes. X and, below, Z have the order of `along_rows`, Y that of tiles.
  void (*multiply)(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const Panel& X,
                   const Panel& Y);
  // Rows [begin, end) of Z += W[row : row + rows, begin : end]ᵀ·Y[Y_row : Y_row + rows], at most BAND rows. `begin` is a
  // multiple of SPAN, and Z has whole stripes.
  void (*multiply_adjoint)(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const Panel& Y,
                           int64_t Y_row, const Panel& Z);

  // sums[i] = the sum of squares of row i, for the rows [begin, end) of a row-contiguous weight.
  void (*sum_of_squares)(const Matrix& weight, int64_t begin, int64_t end, double* sums);

  // Of a turned panel P the Gram matrix PᵀP (8, 8), and P = P·M in place, M (8, 8) upper triangular, both by rows.
  void (*gram)(const Panel& panel, double* gram);
  void (*combine)(const Panel& panel, const float* M);
};

const Kernels& kernels();

}  // namespace pissa::cpu
