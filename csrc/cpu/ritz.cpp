// The operators ritz and triplets for CPU tensors: what Rayleigh–Ritz projections consist of.
#include "ritz.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "../tensors.h"
#include "aten.h"
#include "columns.h"
#include "products.h"

namespace pissa::cpu {
namespace {

using torch::stable::Tensor;

// ‖P[:, j] − s[j]·Q[:, j]‖ for the last `count` columns of two contiguous panels; s has as many elements.
std::vector<double> residual_norms(const Tensor& P, const Tensor& Q, const float* s, int64_t count) {
  const int64_t columns = P.size(1);
  const auto* const p = static_cast<const float*>(P.data_ptr()) + columns - count;
  const auto* const q = static_cast<const float*>(Q.data_ptr()) + columns - count;
  return column_norms(P.size(0), count,
                      [=](int64_t i, int64_t j) { return p[i * columns + j] - s[j] * q[i * columns + j]; });
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// A tensor of `count` numbers that are not known, and of pivots after them.
Tensor unknown(const Tensor& like, int64_t count, const Pivots& pivots) {
  Tensor figures = torch::stable::new_empty(like, {count + 2});
  std::fill_n(floats(figures), count, NAN);
  std::copy(pivots.begin(), pivots.end(), floats(figures) + count);
  return figures;
}

// The first `rank` right singular vectors Z of R (b, b), all singular values, and R·Z with columns of length one.
struct SmallSVD {
  Tensor left, S, right;
};

// Smallest σ_r/σ_1 for which the eigenproblem of RᵀR, which takes half of the time of LAPACK's SVD, gives left vectors
// that are orthogonal to float32's round-off.
constexpr double MIN_RATIO = 1e-3;

SmallSVD small_svd(const Tensor& R, int64_t rank) {
  const int64_t columns = R.size(1);
  const auto [squares, vectors] = aten::eigh(aten::mm(aten::transposed(R), R));
  const auto* const values = static_cast<const double*>(squares.data_ptr());
  if (!(values[columns - rank] > MIN_RATIO * MIN_RATIO * values[columns - 1])) {
    const auto [X, S, Zh] = aten::svd(R);
    Tensor left = X, right = Zh;
    return {torch::stable::narrow(left, 1, 0, rank), S, aten::transposed(torch::stable::narrow(right, 0, 0, rank))};
  }
  // in descending order
  Tensor S = torch::stable::new_empty(R, {columns}), Z = torch::stable::new_empty(R, {columns, rank});
  auto *const sizes = static_cast<double*>(S.data_ptr()), *const right = static_cast<double*>(Z.data_ptr());
  const auto* const from = static_cast<const double*>(vectors.data_ptr());
  for (int64_t j = 0; j < columns; ++j) sizes[j] = std::sqrt(std::max(values[columns - 1 - j], 0.0));
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < rank; ++j)
      right[i * rank + j] = from[i * vectors.stride(0) + (columns - 1 - j) * vectors.stride(1)];
  Tensor X = aten::mm(R, Z);
  auto* const left = static_cast<double*>(X.data_ptr());
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < rank; ++j) left[i * rank + j] /= sizes[j];
  return {X, S, Z};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ritz(const Tensor& weight, const Tensor& Z, int64_t rank, bool gram) {
  STD_TORCH_CHECK(weight.dim() == 2, "pissa_kernels: expected a weight (m, n)");
  const Matrix panel = float_matrix(Z, weight.size(1));
  STD_TORCH_CHECK(!gram || (weight.size(0) == panel.rows && dtype_of(weight.scalar_type()) == Dtype::f32),
                  "pissa_kernels: expected a square float32 matrix");
  STD_TORCH_CHECK(rank >= 1 && rank <= panel.cols, "pissa_kernels: rank must be 1 to the panel's columns, got ", rank);
  const auto [Q, pivots] = orthonormal(torch::stable::contiguous(Z));
  Tensor figures = unknown(Q, panel.cols + rank, pivots);
  if (!resolved(pivots)) return {Q, torch::stable::clone(Q), figures};  // results may not share memory
  Tensor HQ = Q, matrix = Q;
  if (gram) {
    HQ = aten::mm(weight, Q);
    matrix = aten::mm(aten::transposed(Q), HQ);
  } else {
    Tensor AQ = Q;
    std::tie(AQ, HQ) = normal(weight, Q, 3);
    matrix = aten::mm(aten::transposed(AQ), AQ);
  }
  try {
    const auto [values, vectors] = aten::eigh(matrix);
    const Tensor X = aten::mm(Q, vectors), HX = aten::mm(HQ, vectors);
    const auto norms = residual_norms(HX, X, floats(values) + panel.cols - rank, rank);
    std::copy_n(floats(values), panel.cols, floats(figures));
    std::copy(norms.begin(), norms.end(), floats(figures) + panel.cols);
    return {X, HX, figures};
  } catch (const std::runtime_error&) {
    return {Q, HQ, figures};
  }
}

std::tuple<Tensor, Tensor, Tensor> triplets(const Tensor& weight, const Tensor& V, int64_t rank,
                                            const std::optional<Tensor>& image) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(weight.dim() == 2, "pissa_kernels: expected a weight (m, n)");
  const int64_t columns = float_matrix(V, weight.size(1)).cols;
  if (image) float_matrix(*image, weight.size(0), columns);
  STD_TORCH_CHECK(rank >= 1 && rank <= columns, "pissa_kernels: rank must be 1 to the panel's columns, got ", rank);
  const Tensor panel = torch::stable::contiguous(V);
  Tensor P = panel, Y = panel;
  Pivots pivots;
  if (image) {
    const Cleaned found = cleaned(panel);
    P = found.panel;
    Y = aten::mm(*image, found.change);
    pivots.fill(found.pivot);
  } else {
    std::tie(P, pivots) = orthonormal(panel);
    Y = matmul(weight, P, 3);
  }
  auto [Q, others] = orthonormal(Y);
  for (size_t i = 0; i < 2; ++i)
    if (!(others[i] >= pivots[i])) pivots[i] = others[i];  // also if it is NaN
  Tensor figures = unknown(P, columns + rank, pivots);
  if (resolved(pivots)) {
    try {
      const SmallSVD small =
          small_svd(torch::stable::to(aten::mm(aten::transposed(Q), Y), ScalarType::Double), rank);
      const Tensor U = aten::mm(Q, torch::stable::to(small.left, ScalarType::Float));
      const Tensor S = torch::stable::to(small.S, ScalarType::Float), Z = torch::stable::to(small.right, ScalarType::Float);
      const Tensor right = aten::mm(P, Z);
      const auto left_norms = residual_norms(aten::mm(Y, Z), U, floats(S), rank);
      const auto right_norms = residual_norms(rmatmul(weight, U, 3), right, floats(S), rank);
      std::copy_n(floats(S), columns, floats(figures));
      for (int64_t i = 0; i < rank; ++i) {
        const double left = left_norms[i];  // std::max(a, b) is a if b is NaN
        floats(figures)[columns + i] =
            static_cast<float>(left > right_norms[i] || std::isnan(left) ? left : right_norms[i]);
      }
      return {U, right, figures};
    } catch (const std::runtime_error&) {
    }
  }
  const auto leading = [rank](Tensor all) { return torch::stable::contiguous(torch::stable::narrow(all, 1, 0, rank)); };
  return {leading(Q), leading(P), figures};
}

}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("ritz", TORCH_BOX(&pissa::cpu::ritz));
  library.impl("triplets", TORCH_BOX(&pissa::cpu::triplets));
}
