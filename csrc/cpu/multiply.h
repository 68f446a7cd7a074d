// The loops around the kernels' products: panels packed, stripes and spans of W to threads.
//
// Which elements are summed in which order depends on the shapes and the number of threads, not on their schedule.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../tensors.h"
#include "kernels.h"
#include "panels.h"

namespace pissa::cpu {

typedef std::vector<Matrix> Matrices;

// Of a stack (batch, m, n) all, of a matrix one.
inline Matrices matrices_of(const torch::stable::Tensor& tensor) {
  Matrices result;
  const int64_t count = tensor.dim() == 3 ? tensor.size(0) : 1;
  for (int64_t index = 0; index < count; ++index) result.push_back(matrix_at(tensor, index));
  return result;
}

inline Panels packed(const Matrices& panels, Order order) {
  const Matrix& first = panels[0];
  Panels result(panels.size(), first.rows, first.cols, order);
  parallel_ranges(panels.size(), result[0].rows, first.cols, [&](int64_t index, int64_t begin, int64_t end) {
    pack(panels[index], result[index], begin, end);
  });
  return result;
}

// Rows or columns of W that are added into one partial sum, and partial sums that are added into one of the next level.
// The rounding error of a sum grows with the additions on the way from a term to the total: adding eleven thousand rows,
// one such partial sum after the other, left 1.3 times the error of MKL's products.
constexpr int64_t RUN_ROWS = 8 * BAND, RUN_COLS = 2048, FANOUT = 8;

// Rows [begin, end) of `total` = Σ of what f(panel, from, to) adds to them for the parts of [first, last), each of at
// most `run`, by a tree of partial sums. The first of FANOUT is formed in `total`, the others in scratch[level].
template <class F>
void sum_level(const Panel& total, const Panels& scratch, int64_t level, int64_t begin, int64_t end, int64_t first,
               int64_t last, int64_t run, const F& f) {
  if (last - first <= run) {
    clear(total, begin, end);
    return f(total, first, last);
  }
  int64_t part = run;
  while (part * FANOUT < last - first) part *= FANOUT;
  sum_level(total, scratch, level + 1, begin, end, first, first + part, run, f);
  for (int64_t from = first + part; from < last; from += part) {
    sum_level(scratch[level], scratch, level + 1, begin, end, from, std::min(from + part, last), run, f);
    add(total, scratch[level], begin, end);
  }
}

template <class F>
void sum_runs(const Panel& total, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t run, const F& f) {
  int64_t levels = 0;
  for (int64_t part = run; part < last - first; part *= FANOUT) ++levels;
  const Panels scratch(levels, total.rows, total.columns, total.order);
  sum_level(total, scratch, 0, begin, end, first, last, run, f);
}

// The rows [begin, end) of W·X, a band at a time, each with f(Y, row, rows) before it leaves the cache.
template <class F>
void multiply_bands(const Matrix& W, const Panel& X, int64_t begin, int64_t end, const Matrix& out, const F& f) {
  const Panels storage(1, BAND, X.columns, Order::tiles);
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

// Y = W·X and Z = Wᵀ·Y for weights with contiguous rows: each thread has rows, and a sum over them of its own. Z is
// handed to f(index, Z, begin, end), rows [begin, end) of it at a time.
template <class F>
void multiply_both(const Matrices& weights, const Panels& X, const Matrices& Y, const F& f) {
  const Matrix& W = weights[0];
  const int64_t count = weights.size(), columns = Y[0].cols;
  const int64_t stripes = ceil_div(W.rows, STRIPE), spans = ceil_div(W.cols, SPAN);
  const int64_t work = 2 * W.rows * W.cols * columns;
  // as many as make the same number of parts for every thread, of 2^18 multiplications or more
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts =
      std::clamp<int64_t>(threads / std::gcd(threads, count), 1, std::max<int64_t>(std::min(stripes, work >> 18), 1));
  const Panels sums(count * parts, spans * SPAN, columns, along_rows(W, columns));
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
    f(index, total, first * SPAN, std::min(last * SPAN, W.cols));
  });
}

}  // namespace pissa::cpu
