#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>

#include "amx.h"
#include "self_check.h"

namespace pissa::cpu {

extern const Kernels generic;
#if defined(PISSA_X86)
extern const Kernels avx512, avx2;
#endif

namespace {

constexpr int64_t COUNT = static_cast<int64_t>(Isa::count);

const Kernels* table(Isa isa) {
#if defined(PISSA_X86)
  if (isa == Isa::avx2) return &avx2;
  if (isa == Isa::amx || isa == Isa::avx512) return &avx512;
#endif
  return &generic;
}

bool present(Isa isa) {
#if defined(PISSA_X86)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::amx) return has_avx512 && amx::available();
  if (isa == Isa::avx512) return has_avx512;
  if (isa == Isa::avx2) return has_avx2;
#endif
  return isa == Isa::generic;
}

Status find_status(Isa isa) {
  if (!present(isa)) return Status::missing;
  if (isa == Isa::generic) return Status::usable;
#if defined(PISSA_X86)
  if (isa == Isa::amx)
    return status_of(Isa::avx512) == Status::usable && tiles_agree() ? Status::usable : Status::differs;
#endif
  return kernels_agree(*table(isa)) ? Status::usable : Status::differs;
}

Isa best() {
  for (int64_t index = 0; index < COUNT; ++index)
    if (status_of(static_cast<Isa>(index)) == Status::usable) return static_cast<Isa>(index);
  return Isa::generic;
}

std::atomic<int64_t>& current() {
  static std::atomic<int64_t> isa{static_cast<int64_t>(best())};
  return isa;
}

torch::stable::Tensor instruction_sets() {
  const std::array<int64_t, 1> shape{COUNT + 1};
  torch::stable::Tensor result = torch::stable::empty(shape, torch::headeronly::ScalarType::Long);
  auto* const values = static_cast<int64_t*>(result.data_ptr());
  for (int64_t index = 0; index < COUNT; ++index)
    values[index] = static_cast<int64_t>(status_of(static_cast<Isa>(index)));
  values[COUNT] = static_cast<int64_t>(current_isa());
  return result;
}

void use_instruction_set(int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index < COUNT && status_of(static_cast<Isa>(index)) == Status::usable,
                  "pissa_kernels: instruction set ", index, " cannot be used");
  use_isa(static_cast<Isa>(index));
}

}  // namespace

Status status_of(Isa isa) {
  static std::array<std::atomic<int64_t>, COUNT> known{};  // 0, or the status plus one
  std::atomic<int64_t>& entry = known[static_cast<int64_t>(isa)];
  if (entry == 0) entry = static_cast<int64_t>(find_status(isa)) + 1;
  return static_cast<Status>(entry - 1);
}

Isa current_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void use_isa(Isa isa) { current() = static_cast<int64_t>(isa); }

const Kernels& kernels() { return *table(current_isa()); }

bool uses_amx() { return current_isa() == Isa::amx; }

}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CompositeExplicitAutograd, library) {
  library.impl("instruction_sets", TORCH_BOX(&pissa::cpu::instruction_sets));
  library.impl("use_instruction_set", TORCH_BOX(&pissa::cpu::use_instruction_set));
}
