// The schema of every verb, once. Bodies register themselves per device: cpu/verbs.cpp, cuda/*.cu.
//
// Shapes, dtypes and devices are checked by the Python verbs (pissa_kernels/ops/__init__.py) with messages for people;
// what a body would read or write out of bounds without is checked again in tensors.h, because torch.ops is callable by
// anyone.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pissa_kernels, library) {
  library.def("matmul(Tensor weight, Tensor X) -> Tensor");
  library.def("rmatmul(Tensor weight, Tensor Y) -> Tensor");
  library.def("normal(Tensor weight, Tensor X) -> (Tensor, Tensor)");
  library.def("sum_of_squares(Tensor weights) -> Tensor");
  library.def("gram_schmidt(Tensor panel, Tensor basis) -> (Tensor, Tensor, Tensor)");
  library.def("transpose_cast(Tensor weight, ScalarType dtype) -> Tensor");
  // Returns nothing: an operator that returns what it mutates cannot be functionalised by torch.compile.
  library.def(
      "subtract_lowrank_(Tensor(a!) weight, Tensor lora_B, Tensor lora_A, float scaling, bool fan_in_fan_out=False) "
      "-> ()");
}
