// The operators matmul, rmatmul and normal for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <utility>

#include "../tensors.h"
#include "aten.h"
#include "amx_products.h"
#include "isa.h"
#include "kernels.h"
#include "multiply.h"
#include "panels.h"
#include "products.h"

namespace pissa::cpu {
namespace {

using torch::stable::Tensor;

Matrices transposed(Matrices matrices) {
  for (Matrix& matrix : matrices) matrix = matrix.transposed();
  return matrices;
}

void check_operands(const Tensor& weight, const Tensor& panel, int64_t pieces, bool adjoint) {
  STD_TORCH_CHECK(1 <= pieces && pieces <= 3, "pissa_kernels: pieces must be 1, 2 or 3, got ", pieces);
  const int64_t axes = weight.dim();
  STD_TORCH_CHECK(axes == 2 || axes == 3, "pissa_kernels: a weight must be 2-D, or 3-D for a batch");
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

// W·X for weights with contiguous rows. Threads share the rows of the result.
void multiply_rows(const Matrices& weights, const Panels& X, const Matrices& out) {
  const Matrix& W = weights[0];
  const int64_t work = STRIP_ROWS * W.cols * out[0].cols;
  parallel_ranges(weights.size(), ceil_div(W.rows, STRIP_ROWS), work, [&](int64_t index, int64_t begin, int64_t end) {
    multiply_blocks(weights[index], X[index], begin * STRIP_ROWS, std::min(end * STRIP_ROWS, W.rows), out[index],
                    [](const Panel&, int64_t, int64_t) {});
  });
}

// Wᵀ·Y for weights with contiguous rows. Threads share the rows of the result, which are W's columns.
void multiply_columns(const Matrices& weights, const Panels& Y, const Matrices& out) {
  const Matrix& W = weights[0];
  const int64_t blocks = ceil_div(W.cols, BLOCK_COLS), work = BLOCK_COLS * W.rows * out[0].cols;
  const Panels Z(weights.size(), blocks * BLOCK_COLS, out[0].cols, layout_along_rows(W, out[0].cols));
  parallel_ranges(weights.size(), blocks, work, [&](int64_t index, int64_t first, int64_t last) {
    const int64_t begin = first * BLOCK_COLS, end = std::min(last * BLOCK_COLS, W.cols);
    sum_tree(Z[index], begin, last * BLOCK_COLS, 0, W.rows, SUM_ROWS,
             [&](const Panel& sum, int64_t row, int64_t end_row) {
               for (; row < end_row; row += BLOCK_ROWS) {
                 const int64_t rows = std::min(end_row - row, BLOCK_ROWS);
                 kernels().multiply_adjoint(weights[index], row, rows, begin, end, Y[index], row, sum);
               }
             });
    unpack(Z[index], begin, end, out[index], 0);
  });
}

Tensor product(const Tensor& weight, const Tensor& panel, int64_t pieces, bool adjoint) {
  check_operands(weight, panel, pieces, adjoint);
  Tensor result = empty_result(weight, panel, adjoint);
  Matrices weights = matrices_of(weight);
  if (weights.empty()) return result;
  if (adjoint) weights = transposed(std::move(weights));
  const Matrices factors = matrices_of(panel), out = matrices_of(result);
  const bool by_rows = weights[0].row_contiguous();
  if (!by_rows) weights = transposed(std::move(weights));
#if defined(PISSA_X86)
  const auto by_tiles = by_rows ? amx::multiply_rows : amx::multiply_columns;
  if (amx::suits(weights[0]) && by_tiles(weights, factors, pieces, out)) return result;
#endif
  if (by_rows) {
    multiply_rows(weights, packed(factors, layout_along_rows(weights[0], factors[0].cols)), out);
  } else {
    multiply_columns(weights, packed(factors, Layout::tiles), out);
  }
  return result;
}

// Panels of columns in which BLAS computes a Gram matrix of so many columns or more.
constexpr int64_t GRAM_PANELS = 4, LARGE_GRAM = 256;

}  // namespace

Tensor matmul(const Tensor& weight, const Tensor& X, int64_t pieces) { return product(weight, X, pieces, false); }

Tensor rmatmul(const Tensor& weight, const Tensor& Y, int64_t pieces) { return product(weight, Y, pieces, true); }

std::tuple<Tensor, Tensor> normal(const Tensor& weight, const Tensor& X, int64_t pieces) {
  check_operands(weight, X, pieces, false);
  const Matrices weights = matrices_of(weight);
  if (weights.empty() || !weights[0].row_contiguous()) {  // Wᵀ·Y needs the whole of Y
    Tensor Y = product(weight, X, pieces, false);
    return {Y, product(weight, Y, pieces, true)};
  }
  Tensor Y = empty_result(weight, X, false), Z = empty_result(weight, Y, true);
  const Matrices factors = matrices_of(X), out = matrices_of(Z);
#if defined(PISSA_X86)
  if (amx::suits(weights[0]) && amx::multiply_normal(weights, factors, pieces, matrices_of(Y), out)) return {Y, Z};
#endif
  multiply_normal(weights, packed(factors, layout_along_rows(weights[0], out[0].cols)), matrices_of(Y),
                  [&](int64_t index, const Panel& sum, int64_t begin, int64_t end) {
                    unpack(sum, begin, end, out[index], 0);
                  });
  return {Y, Z};
}

// WᵀW of one weight: of bfloat16 on tiles, else of its copy in float32.
Tensor gram(const Tensor& weight) {
  const Matrix W = matrix_of(weight);
  const bool by_rows = W.row_contiguous();
  STD_TORCH_CHECK(by_rows || W.transposed().row_contiguous(),
                  "pissa_kernels: one dimension of the weight must be contiguous");
  const int64_t n = W.cols;
  Tensor result = torch::stable::new_empty(weight, {n, n}, torch::headeronly::ScalarType::Float);
#if defined(PISSA_X86)
  const Matrices weights{by_rows ? W : W.transposed()};
  if (amx::suits(weights[0]) && amx::multiply_gram(weights, !by_rows, matrices_of(result))) return result;
#endif
  Tensor wide = W.dtype == Dtype::f32 ? weight : torch::stable::to(weight, torch::headeronly::ScalarType::Float);
  // the lower triangle, in panels of columns: BLAS takes a fifth to a quarter longer for the whole
  const int64_t panels = n >= LARGE_GRAM ? GRAM_PANELS : 1;
  float* const out = static_cast<float*>(result.data_ptr());
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t begin = n * panel / panels, end = n * (panel + 1) / panels, width = end - begin;
    const Tensor right = torch::stable::narrow(wide, 1, begin, width);
    const Tensor block = aten::mm(aten::transposed(torch::stable::narrow(wide, 1, begin, n - begin)), right);
    const auto* const from = static_cast<const float*>(block.data_ptr());
    for (int64_t i = begin; i < n; ++i) std::copy_n(from + (i - begin) * width, width, out + i * n + begin);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = end; j < n; ++j) out[i * n + j] = from[(j - begin) * width + i - begin];
  }
  return result;
}

}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("matmul", TORCH_BOX(&pissa::cpu::matmul));
  library.impl("rmatmul", TORCH_BOX(&pissa::cpu::rmatmul));
  library.impl("normal", TORCH_BOX(&pissa::cpu::normal));
  library.impl("gram", TORCH_BOX(&pissa::cpu::gram));
}
