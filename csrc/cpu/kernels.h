// The bodies for CPUs. kernels.cpp is compiled once per instruction set; kernels() picks the best that the CPU has.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace pissa::cpu {

struct Kernels {
  const char* name;  // the instruction set

  // out = weightᵀ for the rows [begin, end) of `out`, which is contiguous.
  void (*transpose_cast)(const Matrix& weight, const Matrix& out, int64_t begin, int64_t end);

  // weight −= s·left·right for the rows [begin, end) of a row-contiguous weight, float32 sums, one rounding.
  // `workspace` has subtract_workspace(rank) floats.
  void (*subtract_lowrank)(const Matrix& weight, const Matrix& left, const Matrix& right, float scaling, int64_t begin,
                           int64_t end, float* workspace);
  int64_t (*subtract_workspace)(int64_t rank);
};

const Kernels& kernels();

}  // namespace pissa::cpu
