// Norms of the columns of panels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace pissa::cpu {

// The norm of each column of a panel of `rows` rows, whose elements f(row, column) returns: summed in float32 within
// blocks of rows and in float64 across them.
template <class F>
std::vector<double> column_norms(int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t BLOCK = 64;
  std::vector<double> squares(columns);
  std::vector<float> sums(columns);
  for (int64_t begin = 0; begin < rows; begin += BLOCK) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t i = begin; i < std::min(begin + BLOCK, rows); ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const float value = f(i, j);
        sums[j] += value * value;
      }
    for (int64_t j = 0; j < columns; ++j) squares[j] += sums[j];
  }
  for (double& square : squares) square = std::sqrt(square);
  return squares;
}

}  // namespace pissa::cpu
