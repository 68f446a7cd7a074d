// One round of block Gram–Schmidt with CholeskyQR, for panels of at most eight columns.
#include "gram_schmidt.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "../tensors.h"
#include "isa.h"
#include "multiply.h"
#include "panels.h"

namespace pissa::cpu {
namespace {

using torch::stable::Tensor;

constexpr int64_t MAX_COLUMNS = HALF_TILE;

// M such that P·M is orthonormal, from the Gram matrix of a panel P.
struct Transform {
  float matrix[MAX_COLUMNS * MAX_COLUMNS];  // upper triangular, row-major
  float pivot;                              // the smallest of the scaled Gram matrix's Cholesky factor; 0 if that fails
  float shortest;                           // norm of the shortest column of P
};

// L·Lᵀ = D·G·D, with a diagonal D that scales the diagonal of the product to one, and M = D·L⁻ᵀ; the identity where the
// factorization fails. Columns from `columns` on are unchanged.
Transform cholesky(const double* gram, int64_t columns) {
  Transform transform{};
  double scale[MAX_COLUMNS], L[MAX_COLUMNS][MAX_COLUMNS] = {}, inverse[MAX_COLUMNS][MAX_COLUMNS] = {};
  double least = INFINITY, shortest = INFINITY;
  for (int64_t i = 0; i < MAX_COLUMNS; ++i) transform.matrix[i * MAX_COLUMNS + i] = 1.0f;
  for (int64_t i = 0; i < columns; ++i) {
    const double length = std::sqrt(gram[i * MAX_COLUMNS + i]);
    shortest = length < shortest || std::isnan(length) ? length : shortest;
    scale[i] = 1.0 / length;
  }
  transform.shortest = static_cast<float>(shortest);
  for (int64_t j = 0; j < columns; ++j) {
    double square = 1.0;
    for (int64_t k = 0; k < j; ++k) square -= L[j][k] * L[j][k];
    if (!(square > 0.0 && std::isfinite(scale[j]))) return transform;  // also if `square` is NaN
    L[j][j] = std::sqrt(square);
    least = std::min(least, L[j][j]);
    for (int64_t i = j + 1; i < columns; ++i) {
      double rest = gram[i * MAX_COLUMNS + j] * scale[i] * scale[j];
      for (int64_t k = 0; k < j; ++k) rest -= L[i][k] * L[j][k];
      L[i][j] = rest / L[j][j];
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    inverse[j][j] = 1.0 / L[j][j];
    for (int64_t i = j + 1; i < columns; ++i) {
      double sum = 0.0;
      for (int64_t k = j; k < i; ++k) sum -= L[i][k] * inverse[k][j];
      inverse[i][j] = sum / L[i][i];
    }
  }
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = i; j < columns; ++j)
      transform.matrix[i * MAX_COLUMNS + j] = static_cast<float>(scale[i] * inverse[j][i]);
  transform.pivot = static_cast<float>(least);
  return transform;
}

// panels −= basisᵀ·(basis·panels)
void project_out(const Tensor& basis, const Panels& panels, int64_t columns) {
  const int64_t count = basis.size(0), rows = basis.size(1);
  Tensor coefficients = torch::stable::new_empty(basis, {count, rows, columns});
  multiply_normal(matrices_of(basis), panels, matrices_of(coefficients),
                  [&](int64_t index, const Panel& projection, int64_t begin, int64_t end) {
                    for_contiguous(projection, begin, ceil_div(end, 16) * 16, [&](int64_t at, int64_t size) {
                      const float* const from = projection.data + at;
                      float* const to = panels[index].data + at;
                      for (int64_t i = 0; i < size; ++i) to[i] -= from[i];
                    });
                  });
}

}  // namespace

Round narrow_round(const Tensor& panel, const Tensor& basis) {
  const int64_t n = panel.size(0), columns = panel.size(1);
  Tensor result = torch::stable::new_empty(panel, {n, columns});
  const Panels panels = packed(matrices_of(panel), Layout::transposed);
  if (basis.size(0) > 0) project_out(basis, panels, columns);
  double gram[MAX_COLUMNS * MAX_COLUMNS];
  kernels().gram(panels[0], gram);
  const Transform transform = cholesky(gram, columns);
  kernels().transform(panels[0], transform.matrix);
  unpack(panels[0], 0, n, matrix_of(result), 0);
  return {result, transform.pivot, transform.shortest};
}

}  // namespace pissa::cpu
