// The operator chebyshev_filter for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../tensors.h"
#include "aten.h"
#include "panels.h"
#include "products.h"

namespace pissa::cpu {
namespace {

using torch::stable::Tensor;

// out = a·product − b·current − c·previous, elementwise. `out` may be `product`.
void combine(const Tensor& out, float a, const Tensor& product, float b, const Tensor& current, float c,
             const Tensor& previous) {
  float* const to = static_cast<float*>(out.data_ptr());
  const auto* const x = static_cast<const float*>(product.data_ptr());
  const auto* const y = static_cast<const float*>(current.data_ptr());
  const auto* const z = static_cast<const float*>(previous.data_ptr());
  const int64_t columns = out.size(1);
  parallel_ranges(1, out.size(0), columns, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin * columns; i < end * columns; ++i) to[i] = a * x[i] - b * y[i] - c * z[i];
  });
}

// T_degree(2H/edge − 1)·X by the three-term recurrence, for H = AᵀA of a weight A, or for H itself if `gram`.
Tensor chebyshev_filter(const Tensor& weight, const Tensor& X, const Tensor& HX, double edge, int64_t degree,
                        int64_t pieces, bool gram) {
  STD_TORCH_CHECK(weight.dim() == 2 && X.dim() == 2, "pissa_kernels: expected a weight (m, n) and a panel (n, b)");
  const Matrix image = float_matrix(HX, weight.size(1), X.size(1));
  float_matrix(X, image.rows, image.cols);
  STD_TORCH_CHECK(!gram || (weight.size(0) == image.rows && dtype_of(weight.scalar_type()) == Dtype::f32),
                  "pissa_kernels: expected a square float32 matrix");
  Tensor previous = torch::stable::contiguous(X), current = torch::stable::new_empty(X, {image.rows, image.cols});
  combine(current, static_cast<float>(2 / edge), torch::stable::contiguous(HX), 1.0f, previous, 0.0f, previous);
  for (int64_t left = degree - 2; left >= 0; --left) {
    // the products that follow damp the rounding errors of this one
    const int64_t split = left > 0 ? std::max<int64_t>(pieces - 1, 1) : pieces;
    Tensor next = gram ? aten::mm(weight, current) : std::get<1>(normal(weight, current, split));
    combine(next, static_cast<float>(4 / edge), next, 2.0f, current, 1.0f, previous);
    previous = current;
    current = next;
  }
  return current;
}

}  // namespace
}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("chebyshev_filter", TORCH_BOX(&pissa::cpu::chebyshev_filter));
}
