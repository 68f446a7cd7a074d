// Launches: torch's current stream, and a grid of tiles.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace pissa::cuda {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The tiles of a matrix as a one-dimensional grid, row by row, because the y and z dimensions end at 65535.
struct Tiles {
  unsigned across, blocks;
};

inline Tiles tiles_of(int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols) {
  const int64_t down = (rows + tile_rows - 1) / tile_rows, across = (cols + tile_cols - 1) / tile_cols;
  STD_TORCH_CHECK(down <= INT32_MAX / across, "pissa_kernels: a weight of ", rows, " by ", cols, " is too large");
  return {static_cast<unsigned>(across), static_cast<unsigned>(down * across)};
}

}  // namespace pissa::cuda
