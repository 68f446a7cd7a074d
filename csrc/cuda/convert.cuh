// The three dtypes in registers: conversions by way of float, and vectorized loads and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../matrix.h"

namespace pissa::cuda {

// The widest access to global memory that all targets have.
constexpr int ACCESS_BYTES = 16;

template <class T>
constexpr int PER_ACCESS = ACCESS_BYTES / static_cast<int>(sizeof(T));

template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T element[N];
};

// Loads 8 or 16 bytes, or one element, in one access.
template <int N, class T>
__device__ inline Vector<T, N> load(const T* from) {
  if constexpr (N == 1) {
    return {*from};
  } else {
    const auto words = *reinterpret_cast<const std::conditional_t<N * sizeof(T) == 16, uint4, uint2>*>(from);
    Vector<T, N> vector;
    static_assert(sizeof(words) == sizeof(vector));
    memcpy(&vector, &words, sizeof(words));
    return vector;
  }
}

// In PTX, because the compiler splits the assignment of a vector that was assembled from elements into narrow stores.
template <class T, int N>
__device__ inline void store(T* to, const Vector<T, N>& vector) {
  if constexpr (N == 1) {
    *to = vector.element[0];
  } else {
    uint32_t word[sizeof(vector) / sizeof(uint32_t)];
    memcpy(word, &vector, sizeof(vector));
    const size_t address = __cvta_generic_to_global(to);
    if constexpr (sizeof(vector) == 16) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                   "r"(word[3])
                   : "memory");
    } else {
      static_assert(sizeof(vector) == 8);
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(word[0]), "r"(word[1]) : "memory");
    }
  }
}

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest, ties to even. An equal dtype is copied, so that a NaN keeps its payload.
template <class To, class From>
__device__ inline To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, float>) {
    return widen(value);
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(widen(value));
  } else {
    return __float2bfloat16_rn(widen(value));
  }
}

// Hides a value from the optimizer, so that what depends on it is computed again and not kept in registers.
template <class T>
__device__ inline T opaque(T value) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  asm volatile("" : "+r"(value));
  return value;
}

// Calls `body` with a value of the dtype's type.
template <class Body>
void with_element(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32:
      return body(float());
    case Dtype::f16:
      return body(__half());
    case Dtype::bf16:
      return body(__nv_bfloat16());
  }
}

// Whether each row of a matrix with contiguous rows is aligned to accesses of `bytes` bytes.
inline bool aligned(const void* data, int64_t row_stride, int64_t element_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && row_stride * element_bytes % bytes == 0;
}

}  // namespace pissa::cuda
