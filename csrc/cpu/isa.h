// The instruction set that the kernels use, chosen when one is first needed.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace pissa::cpu {

// The index of a set: a better one comes first. With AMX, bfloat16 weights are multiplied on tiles, and all else is done
// with AVX-512.
enum class Isa : int64_t { amx, avx512, avx2, generic, count };

enum class Status : int64_t {
  usable,
  missing,   // in this library, in the CPU, or not permitted by the operating system
  differs,   // its kernels do not agree with the generic ones
};

// Whether a set can be used. Its kernels are held against the generic ones on a small panel the first time.
Status status_of(Isa isa);

Isa current_isa();
void use_isa(Isa isa);

const Kernels& kernels();
bool uses_amx();

}  // namespace pissa::cpu
