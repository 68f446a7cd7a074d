// The products of bfloat16 weights on AMX tiles: the loops around the kernels of amx.h.
#pragma once

#include <vector>

#include "../matrix.h"

namespace pissa::cpu::amx {

typedef std::vector<Matrix> Matrices;

// Whether tiles compute products of this weight, which has contiguous rows.
bool suits(const Matrix& weight);

// W·X for bfloat16 weights with contiguous rows; `out` is contiguous. False if a range of numbers does not suit bfloat16
// pieces: then the result is not to be used.
bool multiply_rows(const Matrices& weights, const Matrices& X, int64_t pieces, const Matrices& out);
// Wᵀ·Y.
bool multiply_columns(const Matrices& weights, const Matrices& Y, int64_t pieces, const Matrices& out);
// Y = W·X and Z = Wᵀ·Y.
bool multiply_normal(const Matrices& weights, const Matrices& X, int64_t pieces, const Matrices& Y, const Matrices& Z);

// WᵀW; W·Wᵀ if `of_rows`.
bool multiply_gram(const Matrices& weights, bool of_rows, const Matrices& out);

// W −= s·left·right for a W with contiguous rows and float32 factors. False, and nothing done, if W is not bfloat16, or
// bfloat16 does not hold the factors.
bool subtract(const Matrix& W, const Matrix& left, const Matrix& right, float scaling);

}  // namespace pissa::cpu::amx
