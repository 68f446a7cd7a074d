// The operator orthonormalize for CPU tensors: block Gram–Schmidt with CholeskyQR.
#include "orthonormalize.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "aten.h"
#include "columns.h"
#include "gram_schmidt.h"
#include "panels.h"

namespace pissa::cpu {
namespace {

using torch::stable::Tensor;

// Defined and explained in pissa_kernels/ops/panels.py.
constexpr double MIN_PIVOT = 1e-3, ONE_ROUND_PIVOT = 0.5, ORTHOGONAL_LENGTH = 0.99;
constexpr int MAX_ROUNDS = 6;

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// The smaller of the two; NaN if one of them is.
float least(float a, float b) { return a < b || std::isnan(a) ? a : b; }

// panel − basisᵀ·(basis·panel)
Tensor projected(const Tensor& panel, const Tensor& basis) {
  const Tensor part = aten::mm(aten::transposed(basis), aten::mm(basis, panel));
  const float* const from = floats(panel);
  float* const to = floats(part);
  const int64_t columns = panel.size(1);
  parallel_ranges(1, panel.size(0), columns, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin * columns; i < end * columns; ++i) to[i] = from[i] - to[i];
  });
  return part;
}

// One round of CholeskyQR on a contiguous panel P: P·M, M, and what Round holds.
struct Factored {
  Tensor panel, change;
  float pivot, shortest;
};

Factored cholesky_qr(const Tensor& P) {
  const int64_t columns = P.size(1);
  const Tensor gram = aten::mm(aten::transposed(P), P);
  Tensor scaling = torch::stable::new_zeros(P, {columns, columns});
  float *const G = floats(gram), *const D = floats(scaling);
  float shortest = INFINITY, pivot = INFINITY;
  std::vector<float> scale(columns);
  for (int64_t i = 0; i < columns; ++i) {
    const float length = std::sqrt(G[i * columns + i]);
    shortest = least(shortest, length);
    D[i * columns + i] = scale[i] = 1.0f / length;
  }
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < columns; ++j) G[i * columns + j] *= scale[i] * scale[j];
  const auto [factor, info] = aten::cholesky(gram);
  const float* const L = floats(factor);
  const int64_t diagonal = factor.stride(0) + factor.stride(1);
  for (int64_t i = 0; i < columns; ++i) pivot = least(pivot, L[i * diagonal]);
  if (*static_cast<const int32_t*>(info.data_ptr()) != 0) pivot = 0.0f;
  const Tensor change = aten::transposed(aten::solve_lower(factor, scaling));
  return {aten::mm(P, change), change, pivot, shortest};
}

Round wide_round(const Tensor& panel, const Tensor& basis) {
  const Factored found = cholesky_qr(basis.size(0) > 0 ? projected(panel, basis) : panel);
  return {found.panel, found.pivot, found.shortest};
}

Round one_round(const Tensor& panel, const Tensor& basis) {
  return panel.size(1) <= HALF_TILE ? narrow_round(panel, basis) : wide_round(panel, basis);
}

// Norm of the longest column of a contiguous panel.
double longest(const Tensor& panel) {
  const int64_t columns = panel.size(1);
  const auto norms = column_norms(panel.size(0), columns,
                                  [data = floats(panel), columns](int64_t i, int64_t j) { return data[i * columns + j]; });
  return *std::max_element(norms.begin(), norms.end());
}

void check(const Tensor& panel, const Tensor& basis, int64_t near) {
  const auto is_float = [](const Tensor& tensor) { return dtype_of(tensor.scalar_type()) == Dtype::f32; };
  STD_TORCH_CHECK(panel.dim() == 2 && is_float(panel) && panel.size(0) >= 1 && panel.size(1) >= 1,
                  "pissa_kernels: expected a float32 panel (n, b), b >= 1");
  const int64_t n = panel.size(0);
  STD_TORCH_CHECK(basis.dim() == 2 && is_float(basis) && basis.size(1) == n && (basis.stride(1) == 1 || n <= 1),
                  "pissa_kernels: expected a float32 basis of contiguous rows of ", n, " elements");
  STD_TORCH_CHECK(near >= 0 && near <= basis.size(0), "pissa_kernels: near must be a row of the basis, got ", near);
}

// What the rounds leave of a contiguous panel: the panel, its pivots, and the length of its shortest column after the first
// projection.
struct Rounds {
  Tensor panel;
  Pivots pivots;
  float shortest;
};

Rounds rounds(const Tensor& Z, const Tensor& basis, int64_t near) {
  Tensor rows = basis;
  const bool alone = basis.size(0) == 0;
  const Round first = one_round(Z, torch::stable::narrow(rows, 0, near, basis.size(0) - near));
  Round last = first;
  if (!(alone && first.pivot > ONE_ROUND_PIVOT)) {
    for (int number = 1; number < MAX_ROUNDS; ++number) {
      last = one_round(last.panel, basis);
      if (!(first.pivot > MIN_PIVOT && last.pivot > MIN_PIVOT) || last.shortest > ORTHOGONAL_LENGTH) break;
    }
  }
  return {last.panel, {first.pivot, last.pivot}, first.shortest};
}

// The panel, and the figures (3,): the pivots, and the length that the first projection leaves of the shortest column,
// relative to the longest column before it; 1 without a basis.
std::tuple<Tensor, Tensor> orthonormalize(const Tensor& panel, const Tensor& basis, int64_t near) {
  check(panel, basis, near);
  const Tensor Z = torch::stable::contiguous(panel);
  Tensor figures = torch::stable::new_empty(panel, {3});
  Remainder found{Z, {}, 1.0f};
  if (basis.size(0) > 0) {
    found = remainder(Z, basis, near);
  } else {
    std::tie(found.panel, found.pivots) = orthonormal(Z);
  }
  std::copy(found.pivots.begin(), found.pivots.end(), floats(figures));
  floats(figures)[2] = found.kept;
  return {found.panel, figures};
}

}  // namespace

bool resolved(const Pivots& pivots) { return pivots[0] > MIN_PIVOT && pivots[1] > MIN_PIVOT; }

Remainder remainder(const Tensor& panel, const Tensor& basis, int64_t near) {
  const Rounds found = rounds(panel, basis, near);
  return {found.panel, found.pivots, static_cast<float>(found.shortest / longest(panel))};
}

std::pair<Tensor, Pivots> orthonormal(const Tensor& panel) {
  const Rounds found = rounds(panel, torch::stable::new_empty(panel, {0, panel.size(0)}), 0);
  return {found.panel, found.pivots};
}

Cleaned cleaned(const Tensor& panel) {
  const Factored found = cholesky_qr(panel);
  return {found.panel, found.change, found.pivot};
}

}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("orthonormalize", TORCH_BOX(&pissa::cpu::orthonormalize));
}
