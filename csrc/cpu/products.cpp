// The products under their schema.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <utility>

#include "../tensors.h"
#include "kernels.h"
#include "multiply.h"
#include "panels.h"

namespace pissa::cpu {
namespace {

using torch::stable::Tensor;

Matrices transposed(Matrices matrices) {
  for (Matrix& matrix : matrices) matrix = matrix.transposed();
  return matrices;
}

void check_operands(const Tensor& weight, const Tensor& panel, bool adjoint) {
  const int64_t axes = weight.dim();
  STD_TORCH_CHECK(axes == 2 || axes == 3, "pissa_kernels: a weight must be 2-D, or 3-D for a stack");
  const int64_t rows = weight.size(axes - (adjoint ? 2 : 1));
  STD_TORCH_CHECK(panel.dim() == axes && panel.size(axes - 2) == rows && dtype_of(panel.scalar_type()) == Dtype::f32 &&
                      (axes == 2 || panel.size(0) == weight.size(0)),
                  "pissa_kernels: expected a float32 panel of ", rows, " rows for each weight");
  const Matrix first{nullptr, dtype_of(weight.scalar_type()), weight.size(axes - 2), weight.size(axes - 1),
                     weight.stride(axes - 2), weight.stride(axes - 1)};
  STD_TORCH_CHECK(first.row_contiguous() || first.transposed().row_contiguous(),
                  "pissa_kernels: one dimension of the weight must be contiguous");
}

Tensor empty_result(const Tensor& weight, const Tensor& panel, bool adjoint) {
  const int64_t axes = weight.dim(), rows = weight.size(axes - (adjoint ? 1 : 2)), columns = panel.size(axes - 1);
  const auto dtype = torch::headeronly::ScalarType::Float;
  if (axes == 2) return torch::stable::new_empty(weight, {rows, columns}, dtype);
  return torch::stable::new_empty(weight, {weight.size(0), rows, columns}, dtype);
}

// W·X for weights with contiguous rows: rows of the result to threads.
void multiply_rows(const Matrices& weights, const Panels& X, const Matrices& out) {
  const Matrix& W = weights[0];
  const int64_t work = STRIPE * W.cols * out[0].cols;
  parallel_ranges(weights.size(), ceil_div(W.rows, STRIPE), work, [&](int64_t index, int64_t begin, int64_t end) {
    multiply_bands(weights[index], X[index], begin * STRIPE, std::min(end * STRIPE, W.rows), out[index],
                   [](const Panel&, int64_t, int64_t) {});
  });
}

// Wᵀ·Y for weights with contiguous rows: rows of the result, spans of W's columns, to threads.
void multiply_columns(const Matrices& weights, const Panels& Y, const Matrices& out) {
  const Matrix& W = weights[0];
  const int64_t spans = ceil_div(W.cols, SPAN);
  const Panels Z(weights.size(), spans * SPAN, out[0].cols, along_rows(W, out[0].cols));
  parallel_ranges(weights.size(), spans, SPAN * W.rows * out[0].cols, [&](int64_t index, int64_t first, int64_t last) {
    const int64_t begin = first * SPAN, end = std::min(last * SPAN, W.cols);
    sum_runs(Z[index], begin, last * SPAN, 0, W.rows, RUN_ROWS, [&](const Panel& sum, int64_t row, int64_t end_row) {
      for (; row < end_row; row += BAND) {
        const int64_t rows = std::min(end_row - row, BAND);
        kernels().multiply_adjoint(weights[index], row, rows, begin, end, Y[index], row, sum);
      }
    });
    unpack(Z[index], begin, end, out[index], 0);
  });
}

Tensor product(const Tensor& weight, const Tensor& panel, bool adjoint) {
  check_operands(weight, panel, adjoint);
  Tensor result = empty_result(weight, panel, adjoint);
  Matrices weights = matrices_of(weight);
  if (weights.empty()) return result;
  if (adjoint) weights = transposed(std::move(weights));
  const Matrices factors = matrices_of(panel);
  if (weights[0].row_contiguous()) {
    multiply_rows(weights, packed(factors, along_rows(weights[0], factors[0].cols)), matrices_of(result));
  } else {
    multiply_columns(transposed(std::move(weights)), packed(factors, Order::tiles), matrices_of(result));
  }
  return result;
}

Tensor matmul(const Tensor& weight, const Tensor& X) { return product(weight, X, false); }

Tensor rmatmul(const Tensor& weight, const Tensor& Y) { return product(weight, Y, true); }

std::tuple<Tensor, Tensor> normal(const Tensor& weight, const Tensor& X) {
  check_operands(weight, X, false);
  const Matrices weights = matrices_of(weight);
  if (weights.empty() || !weights[0].row_contiguous()) {  // Wᵀ needs all of Y first
    Tensor Y = product(weight, X, false);
    return {Y, product(weight, Y, true)};
  }
  Tensor Y = empty_result(weight, X, false), Z = empty_result(weight, Y, true);
  const Matrices out = matrices_of(Z);
  multiply_both(weights, packed(matrices_of(X), along_rows(weights[0], out[0].cols)), matrices_of(Y),
                [&](int64_t index, const Panel& sum, int64_t begin, int64_t end) {
                  unpack(sum, begin, end, out[index], 0);
                });
  return {Y, Z};
}

}  // namespace
}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("matmul", TORCH_BOX(&pissa::cpu::matmul));
  library.impl("rmatmul", TORCH_BOX(&pissa::cpu::rmatmul));
  library.impl("normal", TORCH_BOX(&pissa::cpu::normal));
}
