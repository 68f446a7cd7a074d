// The products under their schema: panels packed, stripes and spans of W to threads.
//
// Which elements are summed in which order depends on the shapes and the number of threads, not on their schedule.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "kernels.h"
#include "panels.h"

namespace pissa::cpu {
namespace {

using torch::stable::Tensor;
typedef std::vector<Matrix> Matrices;

// Of a stack (batch, m, n) all, of a matrix one.
Matrices matrices_of(const Tensor& tensor) {
  Matrices result;
  const int64_t count = tensor.dim() == 3 ? tensor.size(0) : 1;
  for (int64_t index = 0; index < count; ++index) result.push_back(matrix_at(tensor, index));
  return result;
}

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

Panels packed(const Matrices& panels) {
  const Matrix& first = panels[0];
  Panels result(panels.size(), first.rows, first.cols);
  parallel_ranges(panels.size(), first.rows, first.cols, [&](int64_t index, int64_t begin, int64_t end) {
    pack(panels[index], result[index], begin, end);
  });
  return result;
}

// The rows [begin, end) of W·X, a band at a time, each with f(Y, row, rows) before it leaves the cache.
template <class F>
void multiply_bands(const Matrix& W, const Panel& X, int64_t begin, int64_t end, const Matrix& out, const F& f) {
  const Panels storage(1, BAND, X.columns);
  const Panel Y = storage[0];
  for (int64_t row = begin; row < end; row += BAND) {
    const int64_t rows = std::min(end - row, BAND);
    clear(Y);
    kernels().multiply(W, row, rows, X, Y);
    unpack(Y, 0, rows, out, row);
    f(Y, row, rows);
  }
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
  const Panels Z(weights.size(), spans * SPAN, out[0].cols);
  parallel_ranges(weights.size(), spans, SPAN * W.rows * out[0].cols, [&](int64_t index, int64_t first, int64_t last) {
    const int64_t begin = first * SPAN, end = std::min(last * SPAN, W.cols);
    for_tile_rows(Z[index], begin, last * SPAN, [](int64_t, int64_t, float* row, int64_t width) {
      std::fill_n(row, width, 0.0f);
    });
    for (int64_t row = 0; row < W.rows; row += BAND) {
      const int64_t rows = std::min(W.rows - row, BAND);
      kernels().multiply_adjoint(weights[index], row, rows, begin, end, Y[index], row, Z[index]);
    }
    unpack(Z[index], begin, end, out[index], 0);
  });
}

// W·X and Wᵀ·(W·X) for weights with contiguous rows: each thread has rows, and a sum over them of its own.
void multiply_both(const Matrices& weights, const Panels& X, const Matrices& Y, const Matrices& Z) {
  const Matrix& W = weights[0];
  const int64_t count = weights.size(), columns = Z[0].cols, stripes = ceil_div(W.rows, STRIPE);
  const int64_t work = 2 * W.rows * W.cols * columns;
  // as many as make the same number of parts for every thread, of 2^18 multiplications or more
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts =
      std::clamp<int64_t>(threads / std::gcd(threads, count), 1, std::max<int64_t>(std::min(stripes, work >> 18), 1));
  const Panels sums(count * parts, ceil_div(W.cols, SPAN) * SPAN, columns);
  parallel_ranges(count * parts, 1, work / parts, [&](int64_t part, int64_t, int64_t) {
    const int64_t index = part / parts, first = part % parts * stripes / parts, last = (part % parts + 1) * stripes / parts;
    clear(sums[part]);
    multiply_bands(weights[index], X[index], first * STRIPE, std::min(last * STRIPE, W.rows), Y[index],
                   [&](const Panel& band, int64_t row, int64_t rows) {
                     kernels().multiply_adjoint(weights[index], row, rows, 0, W.cols, band, 0, sums[part]);
                   });
  });
  parallel_ranges(count, W.cols, parts * columns, [&](int64_t index, int64_t begin, int64_t end) {
    const Panel total = sums[index * parts];
    for (int64_t part = 1; part < parts; ++part) add(total, sums[index * parts + part], begin, end);
    unpack(total, begin, end, Z[index], 0);
  });
}

Tensor product(const Tensor& weight, const Tensor& panel, bool adjoint) {
  check_operands(weight, panel, adjoint);
  Tensor result = empty_result(weight, panel, adjoint);
  Matrices weights = matrices_of(weight);
  if (weights.empty()) return result;
  if (adjoint) weights = transposed(std::move(weights));
  const Panels P = packed(matrices_of(panel));
  if (weights[0].row_contiguous()) {
    multiply_rows(weights, P, matrices_of(result));
  } else {
    multiply_columns(transposed(std::move(weights)), P, matrices_of(result));
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
  multiply_both(weights, packed(matrices_of(X)), matrices_of(Y), matrices_of(Z));
  return {Y, Z};
}

}  // namespace
}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("matmul", TORCH_BOX(&pissa::cpu::matmul));
  library.impl("rmatmul", TORCH_BOX(&pissa::cpu::rmatmul));
  library.impl("normal", TORCH_BOX(&pissa::cpu::normal));
}
