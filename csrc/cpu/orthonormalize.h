// Block Gram–Schmidt with CholeskyQR.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <utility>

namespace pissa::cpu {

// Smallest pivots of the scaled Gram matrix's Cholesky factor, of the first round and of the last one: 0 or NaN where the
// factorization failed.
using Pivots = std::array<float, 2>;

// Whether CholeskyQR has orthonormalized a panel with these pivots.
bool resolved(const Pivots& pivots);

// The columns of a contiguous float32 panel, orthonormalized.
std::pair<torch::stable::Tensor, Pivots> orthonormal(const torch::stable::Tensor& panel);

// The same, in one round, of a panel whose columns are orthonormal up to round-off: Z·M, and M, which is upper triangular.
struct Cleaned {
  torch::stable::Tensor panel, change;
  float pivot;
};
Cleaned cleaned(const torch::stable::Tensor& panel);

}  // namespace pissa::cpu
