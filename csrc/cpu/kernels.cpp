// The kernels for one instruction set. The build compiles this file once per set, named by PISSA_ISA.
#include "kernels.h"

#include "product.h"
#include "quantize_blocks.h"
#include "subtract_lowrank.h"
#include "sum_of_squares.h"
#include "transpose_cast.h"
#include "transposed.h"

#define PISSA_STRING_(x) #x
#define PISSA_STRING(x) PISSA_STRING_(x)

namespace {

using pissa::Dtype;
using pissa::Matrix;

template <class From>
void transpose_cast_from(const Matrix& weight, const Matrix& out, int64_t begin, int64_t end) {
  switch (out.dtype) {
    case Dtype::f32:
      return transpose_cast<From, Float32>(weight, out, begin, end);
    case Dtype::f16:
      return transpose_cast<From, Float16>(weight, out, begin, end);
    case Dtype::bf16:
      return transpose_cast<From, BFloat16>(weight, out, begin, end);
  }
}

void transpose_cast_any(const Matrix& weight, const Matrix& out, int64_t begin, int64_t end) {
  switch (weight.dtype) {
    case Dtype::f32:
      return transpose_cast_from<Float32>(weight, out, begin, end);
    case Dtype::f16:
      return transpose_cast_from<Float16>(weight, out, begin, end);
    case Dtype::bf16:
      return transpose_cast_from<BFloat16>(weight, out, begin, end);
  }
}

void subtract_lowrank_any(const Matrix& weight, const Matrix& left, const Matrix& right, float scaling, int64_t begin,
                          int64_t end, float* workspace) {
  switch (weight.dtype) {
    case Dtype::f32:
      return subtract_lowrank<Float32>(weight, left, right, scaling, begin, end, workspace);
    case Dtype::f16:
      return subtract_lowrank<Float16>(weight, left, right, scaling, begin, end, workspace);
    case Dtype::bf16:
      return subtract_lowrank<BFloat16>(weight, left, right, scaling, begin, end, workspace);
  }
}

void sum_of_squares_any(const Matrix& weight, int64_t begin, int64_t end, double* sums) {
  switch (weight.dtype) {
    case Dtype::f32:
      return sum_of_squares<Float32>(weight, begin, end, sums);
    case Dtype::f16:
      return sum_of_squares<Float16>(weight, begin, end, sums);
    case Dtype::bf16:
      return sum_of_squares<BFloat16>(weight, begin, end, sums);
  }
}

void multiply_any(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const Panel& X,
                  const Panel& Y) {
  switch (weight.dtype) {
    case Dtype::f32:
      return multiply<Float32>(weight, row, rows, begin, end, X, Y);
    case Dtype::f16:
      return multiply<Float16>(weight, row, rows, begin, end, X, Y);
    case Dtype::bf16:
      return multiply<BFloat16>(weight, row, rows, begin, end, X, Y);
  }
}

void multiply_adjoint_any(const Matrix& weight, int64_t row, int64_t rows, int64_t begin, int64_t end, const Panel& Y,
                          int64_t Y_row, const Panel& Z) {
  switch (weight.dtype) {
    case Dtype::f32:
      return multiply_adjoint<Float32>(weight, row, rows, begin, end, Y, Y_row, Z);
    case Dtype::f16:
      return multiply_adjoint<Float16>(weight, row, rows, begin, end, Y, Y_row, Z);
    case Dtype::bf16:
      return multiply_adjoint<BFloat16>(weight, row, rows, begin, end, Y, Y_row, Z);
  }
}

}  // namespace

namespace pissa::cpu {
extern const Kernels PISSA_ISA;
const Kernels PISSA_ISA = {PISSA_STRING(PISSA_ISA), transpose_cast_any, subtract_lowrank_any,
                           subtract_workspace,      multiply_any,       multiply_adjoint_any,
                           sum_of_squares_any,      quantize_blocks,    gram,
                           transform};
}  // namespace pissa::cpu
