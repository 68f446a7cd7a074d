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

Panels packed(const Matrices& panels, bool along_columns) {
  const Matrix& first = panels[0];
  Panels result(panels.size(), first.rows, first.cols, along_columns);
  parallel_ranges(panels.size(), result[0].rows, first.cols, [&](int64_t index, int64_t begin, int64_t end) {
    pack(panels[index], result[index], begin, end);
  });
  return result;
}

// Of the sums over W's rows and columns, where those are many, every so many have a sum of their own: one after the
// other, the error of eleven thousand would be 2.5 times BLAS's.
constexpr int64_t RUN_ROWS = 20 * BAND, RUN_COLS = 2048;

// Rows [begin, end) of `total` = Σ of what f(panel, from, to) adds to them for the parts of [first, last).
template <class F>
void sum_runs(const Panel& total, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t run, const F& f) {
  clear(total, begin, end);
  if (last - first <= run) return f(total, first, last);
  const Panels storage(1, total.rows, total.columns, total.turned);
  for (int64_t from = first; from < last; from += run) {
    clear(storage[0], begin, end);
    f(storage[0], from, std::min(from + run, last));
    add(total, storage[0], begin, end);
  }
}

// The rows [begin, end) of W·X, a band at a time, each with f(Y, row, rows) before it leaves the cache.
template <class F>
void multiply_bands(const Matrix& W, const Panel& X, int64_t begin, int64_t end, const Matrix& out, const F& f) {
  const Panels storage(1, BAND, X.columns, false);
  const Panel Y = storage[0];
  for (int64_t row = begin; row < end; row += BAND) {
    const int64_t rows = std::min(end - row, BAND);
    sum_runs(Y, 0, BAND, 0, W.cols, RUN_COLS, [&](const Panel& sum, int64_t from, int64_t to) {
      kernels().multiply(W, row, rows, from, to, X, sum);
    });
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
  const Panels Z(weights.size(), spans * SPAN, out[0].cols, true);
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

// W·X and Wᵀ·(W·X) for weights with contiguous rows: each thread has rows, and a sum over them of its own.
void multiply_both(const Matrices& weights, const Panels& X, const Matrices& Y, const Matrices& Z) {
  const Matrix& W = weights[0];
  const int64_t count = weights.size(), columns = Z[0].cols;
  const int64_t stripes = ceil_div(W.rows, STRIPE), spans = ceil_div(W.cols, SPAN);
  const int64_t work = 2 * W.rows * W.cols * columns;
  // as many as make the same number of parts for every thread, of 2^18 multiplications or more
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts =
      std::clamp<int64_t>(threads / std::gcd(threads, count), 1, std::max<int64_t>(std::min(stripes, work >> 18), 1));
  const Panels sums(count * parts, spans * SPAN, columns, true);
  parallel_ranges(count * parts, 1, work / parts, [&](int64_t part, int64_t, int64_t) {
    const int64_t index = part / parts, turn = part % parts;
    const int64_t first = turn * stripes / parts, last = (turn + 1) * stripes / parts;
    sum_runs(sums[part], 0, sums[part].rows, first * STRIPE, std::min(last * STRIPE, W.rows),
             RUN_ROWS, [&](const Panel& sum, int64_t begin, int64_t end) {
               multiply_bands(weights[index], X[index], begin, end, Y[index],
                              [&](const Panel& band, int64_t row, int64_t rows) {
                                kernels().multiply_adjoint(weights[index], row, rows, 0, W.cols, band, 0, sum);
                              });
             });
  });
  parallel_ranges(count, spans, SPAN * parts * columns, [&](int64_t index, int64_t first, int64_t last) {
    const Panel total = sums[index * parts];
    for (int64_t part = 1; part < parts; ++part) add(total, sums[index * parts + part], first * SPAN, last * SPAN);
    unpack(total, first * SPAN, std::min(last * SPAN, W.cols), Z[index], 0);
  });
}

Tensor product(const Tensor& weight, const Tensor& panel, bool adjoint) {
  check_operands(weight, panel, adjoint);
  Tensor result = empty_result(weight, panel, adjoint);
  Matrices weights = matrices_of(weight);
  if (weights.empty()) return result;
  if (adjoint) weights = transposed(std::move(weights));
  const bool rows = weights[0].row_contiguous();
  const Panels P = packed(matrices_of(panel), rows);
  if (rows) {
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
  multiply_both(weights, packed(matrices_of(X), true), matrices_of(Y), matrices_of(Z));
  return {Y, Z};
}

}  // namespace
}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("matmul", TORCH_BOX(&pissa::cpu::matmul));
  library.impl("rmatmul", TORCH_BOX(&pissa::cpu::rmatmul));
  library.impl("normal", TORCH_BOX(&pissa::cpu::normal));
}
