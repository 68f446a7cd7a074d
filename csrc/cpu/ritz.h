// Ritz pairs and singular triplets on the range of a panel. The functions check their operands.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "orthonormalize.h"

namespace pissa::cpu {

// Ritz vectors X of H = AᵀA for a weight A, or of H itself if `gram`, on the range of Z (n, b): X and H·X (n, b), and the
// figures: the Ritz values (b,), ascending, ‖H·x − θ·x‖ (rank,) of the last ones, and the pivots of the orthonormalization.
// Values and residuals are NaN where LAPACK's eigensolver fails, and where Z is not resolved.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> ritz(const torch::stable::Tensor& weight,
                                                                                     const torch::stable::Tensor& Z,
                                                                                     int64_t rank, bool gram);

// The `rank` leading triplets of A on the range of V (n, b), for A·V = Y = Q·R and R = X·diag(S)·Zᵀ in float64: U = Q·X,
// V·Z, and the figures: S (b,), max(‖A·vᵢ − σᵢ·uᵢ‖, ‖Aᵀ·uᵢ − σᵢ·vᵢ‖) of each, and the smaller pivots of V and Y. `image` is
// A·V where it is known, for a V that is orthonormal up to round-off. S and the residuals are NaN where LAPACK's SVD fails,
// and where a panel is not resolved.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> triplets(
    const torch::stable::Tensor& weight, const torch::stable::Tensor& V, int64_t rank,
    const std::optional<torch::stable::Tensor>& image);

}  // namespace pissa::cpu
