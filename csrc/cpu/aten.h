// Operators of ATen, called through torch's stable ABI without the interpreter.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <utility>

namespace pissa::aten {

using torch::stable::Tensor;

// The operator's first `Results` results, all tensors. `arguments` are all of its arguments, with their schema's types.
template <size_t Results, class... Arguments>
std::array<Tensor, Results> call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), Results)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  if constexpr (Results == 1) {
    return {torch::stable::detail::to<Tensor>(stack[0])};
  } else {
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
  }
}

inline Tensor mm(const Tensor& a, const Tensor& b) { return call<1>("aten::mm", a, b)[0]; }

// aᵀ, a view.
inline Tensor transposed(const Tensor& a) { return torch::stable::transpose(a, 0, 1); }

// The lower Cholesky factor, and info: 0 where the matrix is positive definite.
inline std::pair<Tensor, Tensor> cholesky(const Tensor& a) {
  auto [factor, info] = call<2>("aten::linalg_cholesky_ex", a, /*upper=*/false, /*check_errors=*/false);
  return {std::move(factor), std::move(info)};
}

// Eigenvalues, ascending, and eigenvectors of a symmetric matrix.
inline std::pair<Tensor, Tensor> eigh(const Tensor& a) {
  auto [values, vectors] = call<2>("aten::linalg_eigh", a, std::string("L"));
  return {std::move(values), std::move(vectors)};
}

// L⁻¹·b for a lower triangular L.
inline Tensor solve_lower(const Tensor& L, const Tensor& b) {
  return call<1>("aten::linalg_solve_triangular", L, b, /*upper=*/false, /*left=*/true, /*unitriangular=*/false)[0];
}

}  // namespace pissa::aten
