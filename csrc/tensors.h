// Tensors as matrices: a pointer, a dtype, 64-bit sizes and strides, with the checks that keep accesses in bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <utility>

#include "matrix.h"

namespace pissa {

inline Dtype dtype_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      STD_TORCH_CHECK(false, "pissa_kernels: the dtype must be float32, float16 or bfloat16");
  }
}

inline Matrix matrix_of(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, "pissa_kernels: a tensor must be 2-D, got ", tensor.dim(), " dimensions");
  return {tensor.data_ptr(), dtype_of(tensor.scalar_type()), tensor.size(0),  tensor.size(1),
          tensor.stride(0),  tensor.stride(1)};
}

// A weight (m, n), or the one at `index` of a batch (batch, m, n).
inline Matrix matrix_at(const torch::stable::Tensor& tensor, int64_t index) {
  if (tensor.dim() == 2) return matrix_of(tensor);
  const Dtype dtype = dtype_of(tensor.scalar_type());
  const int64_t bytes = index * tensor.stride(0) * (dtype == Dtype::f32 ? 4 : 2);
  return {static_cast<char*>(tensor.data_ptr()) + bytes, dtype, tensor.size(1), tensor.size(2), tensor.stride(1),
          tensor.stride(2)};
}

// A float32 factor or panel with `rows` rows and `cols` columns, any number of columns if `cols` is negative.
inline Matrix float_matrix(const torch::stable::Tensor& tensor, int64_t rows, int64_t cols = -1) {
  const Matrix matrix = matrix_of(tensor);
  STD_TORCH_CHECK(
      matrix.dtype == Dtype::f32 && matrix.rows == rows && (cols < 0 || matrix.cols == cols),
      "pissa_kernels: expected a float32 matrix of ", rows, " rows, got ", matrix.rows, " by ", matrix.cols);
  return matrix;
}

// W −= s·left·right in the order in which the weight is stored, so that the rows of `weight` are contiguous: `left` is
// (rows, rank), `right` (rank, cols).
struct Subtraction {
  Matrix weight, left, right;
};

inline Subtraction subtraction_of(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_B,
                                  const torch::stable::Tensor& lora_A, bool fan_in_fan_out) {
  Matrix W = matrix_of(weight);
  if (fan_in_fan_out) W = W.transposed();
  STD_TORCH_CHECK(lora_A.dim() == 2, "pissa_kernels: A must be 2-D");
  const int64_t rank = lora_A.size(0);
  Matrix left = float_matrix(lora_B, W.rows, rank), right = float_matrix(lora_A, rank, W.cols);
  if (W.column_major()) {
    W = W.transposed();
    std::swap(left, right);
    left = left.transposed();
    right = right.transposed();
  }
  STD_TORCH_CHECK(W.row_contiguous(), "pissa_kernels: one dimension of the weight must be contiguous");
  return {W, left, right};
}

}  // namespace pissa
