// The schema of every operator. The files in cpu/ and cuda/ register the bodies for their device.
//
// pissa_kernels/ops/__init__.py checks shapes, dtypes and devices before it calls an operator. torch.ops is open to
// every caller, so the bodies check again whatever would be read or written out of bounds, mostly in tensors.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pissa_kernels, library) {
  library.def("matmul(Tensor weight, Tensor X, int pieces=3) -> Tensor");
  library.def("rmatmul(Tensor weight, Tensor Y, int pieces=3) -> Tensor");
  library.def("normal(Tensor weight, Tensor X, int pieces=3) -> (Tensor, Tensor)");
  library.def("gram(Tensor weight) -> Tensor");
  library.def("sum_of_squares(Tensor weights) -> Tensor");
  library.def("instruction_sets() -> Tensor");
  library.def("use_instruction_set(int index) -> ()");
  library.def("orthonormalize(Tensor panel, Tensor basis, int near=0) -> (Tensor, Tensor)");
  library.def(
      "chebyshev_filter(Tensor weight, Tensor X, Tensor HX, float edge, int degree, int pieces=3, bool gram=False) "
      "-> Tensor");
  library.def("ritz(Tensor weight, Tensor Z, int rank, bool gram=False) -> (Tensor, Tensor, Tensor)");
  library.def("triplets(Tensor weight, Tensor V, int rank, Tensor? image=None) -> (Tensor, Tensor, Tensor)");
  library.def(
      "chebyshev(Tensor weight, Tensor? H, Tensor start, int rank, float tol, int max_products) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "lanczos(Tensor weight, Tensor panel, Tensor coupling, Tensor(a!) rows, Tensor(b!)? image, Tensor(c!) T, int size, "
      "int count) -> (Tensor, Tensor, Tensor)");
  library.def("quantize_blocks(Tensor values, int block, Tensor midpoints, Tensor codes) -> (Tensor, Tensor)");
  library.def("transpose_cast(Tensor weight, ScalarType dtype) -> Tensor");
  // Returns nothing, because torch.compile cannot functionalize an operator that returns the argument it mutates.
  library.def(
      "subtract_lowrank_(Tensor(a!) weight, Tensor lora_B, Tensor lora_A, float scaling, bool fan_in_fan_out=False) "
      "-> ()");
}
