// The operators ritz and triplets for CPU tensors: what Rayleigh–Ritz projections consist of.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <tuple>
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

// Ritz vectors X = Q·Z of H = AᵀA for a weight A, or of H itself if `gram`: X and H·X (n, b), the Ritz values (b,),
// ascending, and ‖H·x − θ·x‖ (rank,) of the last ones. All values are NaN where LAPACK's eigensolver fails.
std::tuple<Tensor, Tensor, Tensor, Tensor> ritz(const Tensor& weight, const Tensor& Q, int64_t rank, bool gram) {
  STD_TORCH_CHECK(weight.dim() == 2, "pissa_kernels: expected a weight (m, n)");
  const Matrix panel = float_matrix(Q, weight.size(1));
  STD_TORCH_CHECK(!gram || (weight.size(0) == panel.rows && dtype_of(weight.scalar_type()) == Dtype::f32),
                  "pissa_kernels: expected a square float32 matrix");
  STD_TORCH_CHECK(rank >= 1 && rank <= panel.cols, "pissa_kernels: rank must be 1 to the panel's columns, got ", rank);
  Tensor residuals = torch::stable::new_empty(Q, {rank}), HQ = Q, matrix = Q;
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
    const float* const last = static_cast<const float*>(values.data_ptr()) + panel.cols - rank;
    const auto norms = residual_norms(HX, X, last, rank);
    std::copy(norms.begin(), norms.end(), static_cast<float*>(residuals.data_ptr()));
    return {X, HX, values, residuals};
  } catch (const std::runtime_error&) {
    torch::stable::fill_(residuals, NAN);
    return {Q, HQ, torch::stable::fill_(torch::stable::new_empty(Q, {panel.cols}), NAN), residuals};
  }
}

// Triplets of A on the columns of V, for A·V = Y = Q·R and R = X·diag(S)·Zᵀ in float64: U = Q·X, S, V·Z, and
// max(‖A·vᵢ − σᵢ·uᵢ‖, ‖Aᵀ·uᵢ − σᵢ·vᵢ‖) of each. S and the residuals are NaN where LAPACK's SVD fails.
std::tuple<Tensor, Tensor, Tensor, Tensor> triplets(const Tensor& weight, const Tensor& Q, const Tensor& Y,
                                                    const Tensor& V) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(weight.dim() == 2, "pissa_kernels: expected a weight (m, n)");
  const int64_t rank = float_matrix(V, weight.size(1)).cols;
  for (const Tensor* panel : {&Q, &Y}) float_matrix(*panel, weight.size(0), rank);
  Tensor residuals = torch::stable::new_empty(V, {rank});
  try {
    const auto [X, S, Zh] = aten::svd(torch::stable::to(aten::mm(aten::transposed(Q), Y), ScalarType::Double));
    const Tensor U = aten::mm(Q, torch::stable::to(X, ScalarType::Float));
    const Tensor sizes = torch::stable::to(S, ScalarType::Float);
    const Tensor Z = aten::transposed(torch::stable::to(Zh, ScalarType::Float)), right = aten::mm(V, Z);
    const auto* const sigma = static_cast<const float*>(sizes.data_ptr());
    const auto left_norms = residual_norms(aten::mm(Y, Z), U, sigma, rank);
    const auto right_norms = residual_norms(rmatmul(weight, U, 3), right, sigma, rank);
    for (int64_t i = 0; i < rank; ++i) {
      const double left = left_norms[i];  // std::max(a, b) is a if b is NaN
      static_cast<float*>(residuals.data_ptr())[i] =
          static_cast<float>(left > right_norms[i] || std::isnan(left) ? left : right_norms[i]);
    }
    return {U, sizes, right, residuals};
  } catch (const std::runtime_error&) {
    torch::stable::fill_(residuals, NAN);
    return {Q, torch::stable::fill_(torch::stable::new_empty(V, {rank}), NAN), V, residuals};
  }
}

}  // namespace
}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("ritz", TORCH_BOX(&pissa::cpu::ritz));
  library.impl("triplets", TORCH_BOX(&pissa::cpu::triplets));
}
