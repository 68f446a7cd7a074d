// A strided matrix as kernels take it, independent of torch. Strides are in elements.
#pragma once

#include <cstdint>

namespace pissa {

enum class Dtype { f32, f16, bf16 };

struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  Matrix transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
  bool column_major() const { return row_stride < col_stride; }
  bool row_contiguous() const { return col_stride == 1 || cols <= 1; }
};

}  // namespace pissa
