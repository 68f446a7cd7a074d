// The bodies for CPUs. kernels.cpp is compiled once per instruction set; kernels() picks the best that the CPU has.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace pissa::cpu {

// Rows of a product that are computed at a time.
constexpr int64_t STRIPE = 12;
// Columns of W, or rows of Wᵀ·Y, whose elements are in the first cache at a time: stripes.
constexpr int64_t SPAN = 8 * STRIPE;
// Rows of W, stripes again, that are multiplied from one side and then from the other while they are in the caches.
constexpr int64_t BAND = 5 * STRIPE;
// Columns of a packed panel that lie together; the last eight alone, if they are no more.
constexpr int64_t TILE = 16, HALF_TILE = 8;

// A float32 matrix that kernels multiply: [tile][row][TILE or HALF_TILE], a multiple of HALF_TILE columns in all. Such a
// tile begins at `first column · rows`.
struct Panel {
  float* data;
  int64_t rows, columns;
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

  // Rows [0, rows) of Y += W[row : row + rows]·X, W with contiguous rows; X has W's columns as rows, Y whole stripes,
  // and what follows its `rows` is as it was.
  void (*multiply)(const Matrix& weight, int64_t row, int64_t rows, const Panel& X, const Panel& Y);
  // Rows [begin, end) of Z += W[row : row + rows, begin : end]ᵀ·Y[Y_row : Y_row + rows], at most BAND rows. `begin` is a
  // multiple of SPAN, and Z has whole stripes.
  void (*multiply_adjoint)(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const Panel& Y,
                           int64_t Y_row, const Panel& Z);
};

const Kernels& kernels();

}  // namespace pissa::cpu
