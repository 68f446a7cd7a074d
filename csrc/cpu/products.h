// The operators matmul, rmatmul and normal for CPU tensors, as other operators call them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace pissa::cpu {

// W·X, Wᵀ·Y, and both with Y = W·X. Weights (m, n) or (batch, m, n), float32 panels; all results are float32. `pieces`
// is the number of bfloat16 pieces, 1 to 3, that a panel may be split into: 3 are as accurate as float32.
torch::stable::Tensor matmul(const torch::stable::Tensor& weight, const torch::stable::Tensor& X, int64_t pieces);
torch::stable::Tensor rmatmul(const torch::stable::Tensor& weight, const torch::stable::Tensor& Y, int64_t pieces);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> normal(const torch::stable::Tensor& weight,
                                                                const torch::stable::Tensor& X, int64_t pieces);

}  // namespace pissa::cpu
