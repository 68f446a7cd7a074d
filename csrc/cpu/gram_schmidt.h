// One round of block Gram–Schmidt with CholeskyQR.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

namespace pissa::cpu {

// The part P of a panel (n, b) that is orthogonal to a basis, orthonormalized to ε·cond(P)².
struct Round {
  torch::stable::Tensor panel;
  float pivot;     // the smallest of the scaled Gram matrix's Cholesky factor; 0 or NaN if that fails
  float shortest;  // norm of the shortest column of P
};

// For contiguous float32 panels of 1 to HALF_TILE columns, and bases (k, n) of contiguous rows. The overhead of ATen's
// operators would take most of the time of such a round.
Round narrow_round(const torch::stable::Tensor& panel, const torch::stable::Tensor& basis);

}  // namespace pissa::cpu
