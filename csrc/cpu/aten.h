// Operators of ATen, called through torch's stable ABI without the interpreter.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>

namespace pissa::aten {

using torch::stable::Tensor;

template <size_t... I>
std::array<Tensor, sizeof...(I)> tensors_of(const StableIValue* stack, std::index_sequence<I...>) {
  return {torch::stable::detail::to<Tensor>(stack[I])...};
}

// The operator's `Results` results, all tensors. `arguments` are all of its arguments, with their schema's types.
template <size_t Results, class... Arguments>
std::array<Tensor, Results> call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), Results)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return tensors_of(stack.data(), std::make_index_sequence<Results>());
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

// The reduced SVD: U, the singular values, and Vᵀ.
inline std::array<Tensor, 3> svd(const Tensor& a) {
  return call<3>("aten::linalg_svd", a, /*full_matrices=*/false, /*driver=*/std::nullopt);
}

// L⁻¹·b for a lower triangular L.
inline Tensor solve_lower(const Tensor& L, const Tensor& b) {
  return call<1>("aten::linalg_solve_triangular", L, b, /*upper=*/false, /*left=*/true, /*unitriangular=*/false)[0];
}

}  // namespace pissa::aten
