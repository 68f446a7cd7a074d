// Whether the kernels of an instruction set agree with the generic ones on this CPU, on small matrices.
#pragma once

#include "kernels.h"

namespace pissa::cpu {

bool kernels_agree(const Kernels& kernels);

// Products, Gram matrices and subtractions of bfloat16 weights on AMX tiles.
bool tiles_agree();

}  // namespace pissa::cpu
