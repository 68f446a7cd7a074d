// The other operators for CPU tensors. Threads share the rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <numeric>
#include <vector>

#include "../tensors.h"
#include "amx_products.h"
#include "isa.h"
#include "kernels.h"

namespace pissa::cpu {

namespace {

using torch::stable::Tensor;

// Elements below which another thread costs more than it saves.
constexpr int64_t GRAIN = 32 << 10;

// Rows per thread: a multiple of `unit`, and at least GRAIN elements.
int64_t grain(int64_t cols, int64_t unit) {
  const int64_t rows = GRAIN / (cols > 0 ? cols : 1) + 1;
  return (rows + unit - 1) / unit * unit;
}

Tensor transpose_cast(const Tensor& weight, torch::headeronly::ScalarType dtype) {
  const Matrix W = matrix_of(weight);
  STD_TORCH_CHECK(W.row_contiguous() || W.transposed().row_contiguous(),
                  "pissa_kernels: one dimension of the weight must be contiguous");
  Tensor result = torch::stable::new_empty(weight, {W.cols, W.rows}, dtype);
  const Matrix out = matrix_of(result);
  torch::stable::parallel_for(0, out.rows, grain(out.cols, 64), [&](int64_t begin, int64_t end) {
    kernels().transpose_cast(W, out, begin, end);
  });
  return result;
}

void subtract_lowrank(const Tensor& weight, const Tensor& lora_B, const Tensor& lora_A, double scaling,
                      bool fan_in_fan_out) {
  const auto [W, left, right] = subtraction_of(weight, lora_B, lora_A, fan_in_fan_out);
#if defined(PISSA_X86)
  if (uses_amx() && amx::subtract(W, left, right, static_cast<float>(scaling))) return;
#endif
  const Kernels& body = kernels();
  const int64_t workspace = body.subtract_workspace(left.cols);
  // C++17 lambdas capture structured bindings only with an initializer
  torch::stable::parallel_for(
      0, W.rows, grain(W.cols, 6), [&, &W = W, &left = left, &right = right](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> buffer(new float[workspace]);
        body.subtract_lowrank(W, left, right, static_cast<float>(scaling), begin, end, buffer.get());
      });
}

// (batch,) float64 for a batch (batch, m, n).
Tensor sum_of_squares(const Tensor& weights) {
  STD_TORCH_CHECK(weights.dim() == 3, "pissa_kernels: expected a batch of weights");
  const int64_t count = weights.size(0);
  Tensor result = torch::stable::new_empty(weights, {count}, torch::headeronly::ScalarType::Double);
  for (int64_t index = 0; index < count; ++index) {
    Matrix W = matrix_at(weights, index);
    if (!W.row_contiguous()) W = W.transposed();  // not column_major(), because rows may share memory
    STD_TORCH_CHECK(W.row_contiguous(), "pissa_kernels: one dimension of the weight must be contiguous");
    std::vector<double> sums(W.rows);
    torch::stable::parallel_for(0, W.rows, grain(W.cols, 1), [&](int64_t begin, int64_t end) {
      kernels().sum_of_squares(W, begin, end, sums.data());
    });
    static_cast<double*>(result.data_ptr())[index] = std::accumulate(sums.begin(), sums.end(), 0.0);
  }
  return result;
}

}  // namespace
}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("transpose_cast", TORCH_BOX(&pissa::cpu::transpose_cast));
  library.impl("sum_of_squares", TORCH_BOX(&pissa::cpu::sum_of_squares));
  library.impl("subtract_lowrank_", TORCH_BOX(&pissa::cpu::subtract_lowrank));
}
