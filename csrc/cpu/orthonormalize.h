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

// The part of a contiguous float32 panel that is orthogonal to a basis, orthonormalized, and the length that the first
// projection leaves of the shortest column, relative to the longest column before it. The basis is not empty and has
// contiguous rows; the first projection uses those from `near` on.
struct Remainder {
  torch::stable::Tensor panel;
  Pivots pivots;
  float kept;
};
Remainder remainder(const torch::stable::Tensor& panel, const torch::stable::Tensor& basis, int64_t near);

// The columns of a contiguous float32 panel, orthonormalized.
std::pair<torch::stable::Tensor, Pivots> orthonormal(const torch::stable::Tensor& panel);

// The same, in one round, of a panel whose columns are orthonormal up to round-off: Z·M, and M, which is upper triangular.
struct Cleaned {
  torch::stable::Tensor panel, change;
  float pivot;
};
Cleaned cleaned(const torch::stable::Tensor& panel);

}  // namespace pissa::cpu
