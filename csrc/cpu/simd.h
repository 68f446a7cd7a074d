// Eight floats at a time in the vector extension of GCC and Clang, and the three storage types of a weight.
//
// Everything is in an unnamed namespace, and no inline function comes from the standard library: kernels.cpp is
// compiled once per instruction set, and the linker would keep one copy of a shared inline function, that of whichever
// set came first.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "../matrix.h"

namespace {

typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef float f32x16 __attribute__((vector_size(64)));
constexpr int LANES = 8;
constexpr int64_t LINE_BYTES = 64;

template <class V>
inline __attribute__((always_inline)) V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
inline __attribute__((always_inline)) void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

template <class To, class From>
inline __attribute__((always_inline)) To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Eight of the lanes.
inline __attribute__((always_inline)) f32x8 lower(f32x8 v) { return v; }
inline __attribute__((always_inline)) f32x8 upper(f32x8 v) { return v; }
inline __attribute__((always_inline)) f32x8 lower(f32x16 v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
}
inline __attribute__((always_inline)) f32x8 upper(f32x16 v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline __attribute__((always_inline)) u32x8 zero_extend(u16x8 v) {
#if defined(__AVX2__)
  return bit_cast<u32x8>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));  // GCC compiles the builtin to four instructions
#else
  return __builtin_convertvector(v, u32x8);
#endif
}

// Drops the upper halves, which must be zero. Intrinsics again, because GCC's builtin takes more instructions.
inline __attribute__((always_inline)) u16x8 truncate(u32x8 v) {
#if defined(__AVX2__)
  const __m256i x = bit_cast<__m256i>(v);
  return bit_cast<u16x8>(_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
#else
  return __builtin_convertvector(v, u16x8);
#endif
}

inline __attribute__((always_inline)) u32x8 select(u32x8 mask, u32x8 yes, u32x8 no) {
  return (mask & yes) | (~mask & no);
}

// The storage types: `widen` to float32 is exact, `round` goes to nearest, ties to even.

struct Float32 {
  typedef float Scalar;
  typedef f32x8 Vector;
  static constexpr bool DEINTERLEAVED = false;
  static inline __attribute__((always_inline)) f32x8 widen(Vector v) { return v; }
  static inline __attribute__((always_inline)) Vector round(f32x8 v) { return v; }
};

struct BFloat16 {
  typedef uint16_t Scalar;
  typedef u16x8 Vector;
  static constexpr bool DEINTERLEAVED = true;
  // Elements 2i + PARITY of sixteen. A bfloat16 is the upper half of its float32, so that it takes only a shift or a
  // mask of each pair of elements, as a 32-bit word.
  template <int PARITY>
  static inline __attribute__((always_inline)) f32x8 deinterleave(u32x8 pairs) {
    constexpr bool lower_half = (PARITY == 0) == (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    return bit_cast<f32x8>(lower_half ? pairs << 16 : pairs & 0xffff0000u);
  }
  static inline __attribute__((always_inline)) f32x8 widen(Vector v) {
    return bit_cast<f32x8>(zero_extend(v) << 16);
  }
  // the quiet bit is set in a NaN, whose upper half alone might be Inf
  static inline __attribute__((always_inline)) Vector round(f32x8 v) {
    const u32x8 u = bit_cast<u32x8>(v);
    const u32x8 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const u32x8 nan = bit_cast<u32x8>(v != v);
    return truncate(select(nan, (u >> 16) | 0x40u, rounded));
  }
};

struct Float16 {
  typedef uint16_t Scalar;
  typedef u16x8 Vector;
  static constexpr bool DEINTERLEAVED = false;
  // Without F16C, exponent and mantissa are shifted to their places in a float32, and 2^112 corrects the bias of the
  // exponent, also for subnormal numbers.
  static inline __attribute__((always_inline)) f32x8 widen(Vector v) {
#if defined(__F16C__)
    return bit_cast<f32x8>(_mm256_cvtph_ps(bit_cast<__m128i>(v)));
#else
    const u32x8 h = zero_extend(v);
    const f32x8 scaled = bit_cast<f32x8>((h & 0x7fffu) << 13) * 0x1p112f;
    const u32x8 special = bit_cast<u32x8>((h & 0x7c00u) == 0x7c00u);  // Inf and NaN
    return bit_cast<f32x8>(bit_cast<u32x8>(scaled) | (special & 0x7f800000u) | ((h & 0x8000u) << 16));
#endif
  }
  // Inf from 65520 on, half a step above 65504, the largest finite number
  static inline __attribute__((always_inline)) Vector round(f32x8 v) {
    const u32x8 u = bit_cast<u32x8>(v), magnitude = u & 0x7fffffffu;
    const u32x8 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    // after 0.5 is added the last bit of the float32 is worth 2^-24, the smallest subnormal float16
    const u32x8 small = bit_cast<u32x8>(bit_cast<f32x8>(magnitude) + 0.5f) - 0x3f000000u;
    u32x8 half = select(bit_cast<u32x8>(magnitude < 0x38800000u), small, normal);
    half = select(bit_cast<u32x8>(magnitude >= 0x477ff000u), u32x8{} + 0x7c00u, half);
    half = select(bit_cast<u32x8>(magnitude > 0x7f800000u), u32x8{} + 0x7e00u, half);
    return truncate(half | ((u & 0x80000000u) >> 16));
  }
};

template <class T>
inline __attribute__((always_inline)) f32x8 load_wide(const typename T::Scalar* from) {
  return T::widen(load<typename T::Vector>(from));
}

// The first `count` of eight elements, the others zero and not read from memory.
template <class T>
inline f32x8 load_wide(const typename T::Scalar* from, int64_t count) {
  typename T::Scalar buffer[LANES] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load_wide<T>(buffer);
}

// Half of sixteen elements: the even (0) or odd ones (1) of a type that deinterleaves faster than it widens
// (Layout::deinterleaved), else the first (0) or last (1) eight.
template <class T, int HALF>
inline __attribute__((always_inline)) f32x8 load_half(const typename T::Scalar* from) {
  if constexpr (T::DEINTERLEAVED) return T::template deinterleave<HALF>(load<u32x8>(from));
  return load_wide<T>(from + HALF * LANES);
}

// Keeps a value in a register: otherwise GCC loads it again as the memory operand of every product that it is used in.
inline __attribute__((always_inline)) void keep_in_register(f32x8& value) {
#if defined(__AVX2__)
  asm("" : "+x"(value));
#else
  (void)value;
#endif
}

template <class T>
inline __attribute__((always_inline)) void store_rounded(typename T::Scalar* to, f32x8 value) {
  store(to, T::round(value));
}

template <class T>
inline void store_rounded(typename T::Scalar* to, f32x8 value, int64_t count) {
  typename T::Scalar buffer[LANES];
  store_rounded<T>(buffer, value);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

}  // namespace
