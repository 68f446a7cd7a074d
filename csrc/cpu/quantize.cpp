// Weights in four bits, in blocks that share a scale.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../tensors.h"
#include "isa.h"
#include "kernels.h"

namespace pissa::cpu {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements below which another thread costs more than it saves.
constexpr int64_t GRAIN = 32 << 10;
// Elements that the kernel takes at a time.
constexpr int64_t UNIT = 32;

// Two codes in each byte (values / 2,), and the largest magnitude of each block.
std::tuple<Tensor, Tensor> quantize_blocks(const Tensor& values, int64_t block, const Tensor& midpoints,
                                           const Tensor& codes) {
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == ScalarType::Float && values.is_contiguous(),
                  "pissa_kernels: expected a contiguous vector of float32 values");
  STD_TORCH_CHECK(midpoints.dim() == 1 && midpoints.size(0) == MIDPOINTS && midpoints.is_contiguous() &&
                      midpoints.scalar_type() == ScalarType::Float,
                  "pissa_kernels: expected ", MIDPOINTS, " midpoints in float32");
  STD_TORCH_CHECK(codes.dim() == 1 && codes.size(0) == MIDPOINTS + 1 && codes.is_contiguous() &&
                      codes.scalar_type() == ScalarType::Byte,
                  "pissa_kernels: expected ", MIDPOINTS + 1, " codes in uint8");
  const int64_t count = values.size(0);
  STD_TORCH_CHECK(block > 0 && block % UNIT == 0 && count % 2 == 0,
                  "pissa_kernels: expected blocks of a multiple of ", UNIT, " values, and an even number of values");
  Table table;
  for (int64_t k = 0; k < MIDPOINTS; ++k) table.midpoints[k] = static_cast<const float*>(midpoints.data_ptr())[k];
  for (int64_t k = 0; k <= MIDPOINTS; ++k) table.codes[k] = static_cast<const uint8_t*>(codes.data_ptr())[k] & 15;
  const int64_t blocks = (count + block - 1) / block;
  Tensor packed = torch::stable::new_empty(values, {count / 2}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(values, {blocks});
  const Kernels& body = kernels();
  torch::stable::parallel_for(0, blocks, GRAIN / block + 1, [&](int64_t begin, int64_t end) {
    body.quantize_blocks(static_cast<const float*>(values.data_ptr()), count, table, block, begin, end,
                         static_cast<uint8_t*>(packed.data_ptr()), static_cast<float*>(scales.data_ptr()));
  });
  return {packed, scales};
}

}  // namespace
}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("quantize_blocks", TORCH_BOX(&pissa::cpu::quantize_blocks));
}
