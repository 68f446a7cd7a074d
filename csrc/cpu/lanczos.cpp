// The operator lanczos for CPU tensors: steps of block Lanczos with full reorthogonalization.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "../tensors.h"
#include "aten.h"
#include "orthonormalize.h"
#include "panels.h"
#include "products.h"

namespace pissa::cpu {
namespace {

using torch::stable::Tensor;

// A matrix of which blocks are written, contiguous rows of float32.
struct Store {
  float* data;
  int64_t rows, cols;

  float* at(int64_t row, int64_t col) const { return data + row * cols + col; }

  // to[col + j, row + i] = from[i, j], in blocks that stay in L1.
  void put_transposed(const Matrix& from, int64_t row, int64_t col) const {
    constexpr int64_t BLOCK = 256;
    const auto* const values = static_cast<const float*>(from.data);
    parallel_ranges(1, ceil_div(from.rows, BLOCK), BLOCK * from.cols, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t begin = first * BLOCK; begin < std::min(last * BLOCK, from.rows); begin += BLOCK)
        for (int64_t j = 0; j < from.cols; ++j)
          for (int64_t i = begin; i < std::min(begin + BLOCK, from.rows); ++i)
            *at(row + j, col + i) = values[i * from.row_stride + j * from.col_stride];
    });
  }
};

// PᵀR for contiguous panels of COLUMNS columns: summed in float32 within blocks of rows and in float64 across them.
template <int64_t COLUMNS>
void small_product(const float* P, const float* R, int64_t rows, float* out) {
  constexpr int64_t BLOCK = 64, COUNT = COLUMNS * COLUMNS;
  double total[COUNT] = {};
  for (int64_t begin = 0; begin < rows; begin += BLOCK) {
    float sum[COUNT] = {};
    for (int64_t i = begin; i < std::min(begin + BLOCK, rows); ++i)
      for (int64_t j = 0; j < COLUMNS; ++j)
        for (int64_t k = 0; k < COLUMNS; ++k) sum[j * COLUMNS + k] += P[i * COLUMNS + j] * R[i * COLUMNS + k];
    for (int64_t j = 0; j < COUNT; ++j) total[j] += sum[j];
  }
  std::copy_n(total, COUNT, out);
}

// PᵀR for contiguous panels. BLAS takes ten times as long as the loop for the narrowest ones.
Tensor inner(const Tensor& P, const Tensor& R) {
  const int64_t columns = P.size(1);
  const auto body = columns == 4 ? small_product<4> : columns == 8 ? small_product<8> : nullptr;
  if (body == nullptr) return aten::mm(aten::transposed(P), R);
  Tensor result = torch::stable::new_empty(P, {columns, columns});
  const auto floats = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  body(floats(P), floats(R), P.size(0), floats(result));
  return result;
}

Store store_of(const Tensor& tensor, int64_t rows, int64_t cols) {
  const Matrix matrix = float_matrix(tensor, rows, cols);
  STD_TORCH_CHECK(matrix.row_contiguous() && matrix.row_stride == cols,
                  "pissa_kernels: expected contiguous float32 matrices to write to");
  return {static_cast<float*>(matrix.data), rows, cols};
}

}  // namespace

// `count` steps as LanczosBasis.advance() of pissa_kernels/svd/krylov.py describes them: the panel Q (n, b) and its coupling
// (k, b) to the basis are appended to rows (limit, n) = Qᵀ and T (limit, limit), A·Q to image (limit, m) = (A·Q)ᵀ if it is
// wanted, and the next panel is what HQ leaves orthogonal to the basis. Returns that panel, its coupling, and the figures
// (3,): the steps made; the least length that a projection has left of a column, relative to the longest; and whether the
// panel is resolved. The panel is HQ itself where it is not, and no step follows.
std::tuple<Tensor, Tensor, Tensor> lanczos(const Tensor& weight, const Tensor& panel, const Tensor& coupling,
                                           const Tensor& rows, const std::optional<Tensor>& image, const Tensor& T,
                                           int64_t size, int64_t count) {
  STD_TORCH_CHECK(weight.dim() == 2 && T.dim() == 2, "pissa_kernels: expected a weight (m, n) and a matrix T");
  const int64_t n = weight.size(1), limit = T.size(0), block = float_matrix(panel, n).cols;
  const Store basis = store_of(rows, limit, n), projected = store_of(T, limit, limit);
  const Store images = image ? store_of(*image, limit, weight.size(0)) : Store{nullptr, 0, 0};
  int64_t coupled = coupling.size(0);
  float_matrix(coupling, coupled, block);
  STD_TORCH_CHECK(count >= 1 && block >= 1 && size >= coupled && size + count * block <= limit,
                  "pissa_kernels: the basis has no room for ", count, " steps");
  Tensor Q = torch::stable::contiguous(panel), off_diagonal = coupling, figures = torch::stable::new_empty(panel, {3});
  auto* const to = static_cast<float*>(figures.data_ptr());
  float kept = 1.0f;
  bool is_resolved = true;
  int64_t step = 0;
  while (step < count && is_resolved) {
    const int64_t first = size - coupled;
    basis.put_transposed(matrix_of(Q), size, 0);
    projected.put_transposed(matrix_of(off_diagonal), size, first);
    const auto [AQ, HQ] = normal(weight, Q, 3);
    // (AQ)ᵀ(AQ), not Qᵀ(HQ), which is less accurate in directions whose singular values are small relative to ‖A‖
    const Tensor matrix = inner(AQ, AQ);
    projected.put_transposed(matrix_of(matrix), size, size);
    if (image) images.put_transposed(matrix_of(AQ), size, 0);
    size += block;
    ++step;
    Tensor whole = rows;
    const Remainder found = remainder(HQ, torch::stable::narrow(whole, 0, 0, size), first);
    is_resolved = resolved(found.pivots);
    kept = found.kept < kept || std::isnan(found.kept) ? found.kept : kept;
    Q = is_resolved ? found.panel : HQ;
    if (is_resolved) off_diagonal = inner(HQ, Q);
    coupled = block;
  }
  to[0] = static_cast<float>(step);
  to[1] = kept;
  to[2] = is_resolved ? 1.0f : 0.0f;
  return {Q, off_diagonal, figures};
}

}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) { library.impl("lanczos", TORCH_BOX(&pissa::cpu::lanczos)); }
