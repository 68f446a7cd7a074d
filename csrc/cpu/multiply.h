// The loops around the product kernels: packing, blocks of W, threads, and the order of the sums.
//
// The order of the sums depends on the shapes and the number of threads, not on how threads are scheduled.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../tensors.h"
#include "isa.h"
#include "kernels.h"
#include "panels.h"

namespace pissa::cpu {

typedef std::vector<Matrix> Matrices;

// The matrices of a batch (batch, m, n), or a single one.
inline Matrices matrices_of(const torch::stable::Tensor& tensor) {
  Matrices result;
  const int64_t count = tensor.dim() == 3 ? tensor.size(0) : 1;
  for (int64_t index = 0; index < count; ++index) result.push_back(matrix_at(tensor, index));
  return result;
}

inline Panels packed(const Matrices& panels, Layout layout) {
  const Matrix& first = panels[0];
  Panels result(panels.size(), first.rows, first.cols, layout);
  parallel_ranges(panels.size(), result[0].rows, first.cols, [&](int64_t index, int64_t begin, int64_t end) {
    pack(panels[index], result[index], begin, end);
  });
  return result;
}

// Rows or columns of W in one partial sum, and the number of partial sums in one of the next level of the tree. The
// rounding error of a sum grows with the number of additions between a term and the total: with the partial sums of
// 11,000 rows added one after the other, Wᵀ·Y had 1.3 times the error of MKL's product.
constexpr int64_t SUM_ROWS = 8 * BLOCK_ROWS, SUM_COLS = 2048, FANOUT = 8;

// Rows [begin, end) of `total` = the sum, as a tree, of what f(panel, from, to) adds to them for parts of [first, last)
// of at most `leaf`. The first branch is summed in `total`, each of the others in scratch[level] and then added.
template <class F>
void sum_branches(const Panel& total, const Panels& scratch, int64_t level, int64_t begin, int64_t end, int64_t first,
                  int64_t last, int64_t leaf, const F& f) {
  if (last - first <= leaf) {
    clear(total, begin, end);
    return f(total, first, last);
  }
  int64_t branch = leaf;
  while (branch * FANOUT < last - first) branch *= FANOUT;
  sum_branches(total, scratch, level + 1, begin, end, first, first + branch, leaf, f);
  for (int64_t from = first + branch; from < last; from += branch) {
    sum_branches(scratch[level], scratch, level + 1, begin, end, from, std::min(from + branch, last), leaf, f);
    add(total, scratch[level], begin, end);
  }
}

template <class F>
void sum_tree(const Panel& total, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t leaf, const F& f) {
  int64_t levels = 0;
  for (int64_t branch = leaf; branch < last - first; branch *= FANOUT) ++levels;
  const Panels scratch(levels, total.rows, total.used, total.layout);
  sum_branches(total, scratch, 0, begin, end, first, last, leaf, f);
}

// Rows [begin, end) of W·X, a block of rows at a time; f(Y, row, rows) is called while the block's part Y is in cache.
template <class F>
void multiply_blocks(const Matrix& W, const Panel& X, int64_t begin, int64_t end, const Matrix& out, const F& f) {
  const Panels storage(1, BLOCK_ROWS, X.used, Layout::tiles);
  const Panel Y = storage[0];
  for (int64_t row = begin; row < end; row += BLOCK_ROWS) {
    const int64_t rows = std::min(end - row, BLOCK_ROWS);
    sum_tree(Y, 0, BLOCK_ROWS, 0, W.cols, SUM_COLS, [&](const Panel& sum, int64_t from, int64_t to) {
      kernels().multiply(W, row, rows, from, to, X, sum);
    });
    unpack(Y, 0, rows, out, row);
    f(Y, row, rows);
  }
}

// Y = W·X and Z = Wᵀ·Y for weights with contiguous rows. A weight's rows are split into parts, one to a thread, each
// with its own sum for Z. f(index, Z, begin, end) is called for ranges of rows of each finished Z.
template <class F>
void multiply_normal(const Matrices& weights, const Panels& X, const Matrices& Y, const F& f) {
  const Matrix& W = weights[0];
  const int64_t count = weights.size(), columns = Y[0].cols;
  const int64_t strips = ceil_div(W.rows, STRIP_ROWS), blocks = ceil_div(W.cols, BLOCK_COLS);
  const int64_t work = 2 * W.rows * W.cols * columns;
  // the fewest parts that divide evenly among the threads, but none of fewer than 2^18 multiplications
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts =
      std::clamp<int64_t>(threads / std::gcd(threads, count), 1, std::max<int64_t>(std::min(strips, work >> 18), 1));
  const Panels sums(count * parts, blocks * BLOCK_COLS, columns, layout_along_rows(W, columns));
  parallel_ranges(count * parts, 1, work / parts, [&](int64_t item, int64_t, int64_t) {
    const int64_t index = item / parts, part = item % parts;
    const int64_t first = part * strips / parts, last = (part + 1) * strips / parts;
    sum_tree(sums[item], 0, sums[item].rows, first * STRIP_ROWS, std::min(last * STRIP_ROWS, W.rows), SUM_ROWS,
             [&](const Panel& sum, int64_t begin, int64_t end) {
               multiply_blocks(weights[index], X[index], begin, end, Y[index],
                               [&](const Panel& block, int64_t row, int64_t rows) {
                                 kernels().multiply_adjoint(weights[index], row, rows, 0, W.cols, block, 0, sum);
                               });
             });
  });
  parallel_ranges(count, blocks, BLOCK_COLS * parts * columns, [&](int64_t index, int64_t first, int64_t last) {
    const Panel total = sums[index * parts];
    const int64_t begin = first * BLOCK_COLS, end = last * BLOCK_COLS;
    for (int64_t part = 1; part < parts; ++part) add(total, sums[index * parts + part], begin, end);
    f(index, total, begin, std::min(end, W.cols));
  });
}

}  // namespace pissa::cpu
