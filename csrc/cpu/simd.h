// Eight floats at a time in the compilers' vector extension (GCC, Clang), and the three storage types of a weight.
//
// Everything is in an unnamed namespace and includes nothing inline from the standard library: kernels.cpp is compiled
// once per instruction set, and a shared inline function would be linked from whichever object came first.
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
constexpr int LANES = 8;

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
inline __attribute__((always_inline)) To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline __attribute__((always_inline)) u32x8 extend(u16x8 v) {
#if defined(__AVX2__)
  return bits<u32x8>(_mm256_cvtepu16_epi32(bits<__m128i>(v)));  // GCC makes four instructions of the conversion
#else
  return __builtin_convertvector(v, u32x8);
#endif
}

// The lower halves, where the upper ones are zero: one more of GCC's conversions that take too many instructions.
inline __attribute__((always_inline)) u16x8 lower(u32x8 v) {
#if defined(__AVX2__)
  const __m256i x = bits<__m256i>(v);
  return bits<u16x8>(_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
#else
  return __builtin_convertvector(v, u16x8);
#endif
}

inline __attribute__((always_inline)) u32x8 select(u32x8 mask, u32x8 yes, u32x8 no) {
  return (mask & yes) | (~mask & no);
}

struct Float32 {
  typedef float Scalar;
  typedef f32x8 Vector;
  static constexpr bool PARTED = false;
  static inline __attribute__((always_inline)) f32x8 widen(Vector v) { return v; }
  static inline __attribute__((always_inline)) Vector narrow(f32x8 v) { return v; }
};

struct BFloat16 {
  typedef uint16_t Scalar;
  typedef u16x8 Vector;
  static constexpr bool PARTED = true;
  // the elements 2i + PART: each is the upper half of a float that a pair of them makes, or becomes it
  template <int PART>
  static inline __attribute__((always_inline)) f32x8 part(u32x8 pairs) {
    constexpr bool lower_half = (PART == 0) == (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    return bits<f32x8>(lower_half ? pairs << 16 : pairs & 0xffff0000u);
  }
  static inline __attribute__((always_inline)) f32x8 widen(Vector v) {
    return bits<f32x8>(extend(v) << 16);
  }
  // to nearest, ties to even; NaN keeps a set bit of its payload
  static inline __attribute__((always_inline)) Vector narrow(f32x8 v) {
    const u32x8 u = bits<u32x8>(v);
    const u32x8 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const u32x8 nan = bits<u32x8>(v != v);
    return lower(select(nan, (u >> 16) | 0x40u, rounded));
  }
};

struct Float16 {
  typedef uint16_t Scalar;
  typedef u16x8 Vector;
  static constexpr bool PARTED = false;
  // Exponent and mantissa move to their float32 places, 2^112 corrects the bias, subnormals included.
  static inline __attribute__((always_inline)) f32x8 widen(Vector v) {
#if defined(__F16C__)
    return bits<f32x8>(_mm256_cvtph_ps(bits<__m128i>(v)));
#else
    const u32x8 h = extend(v);
    const f32x8 scaled = bits<f32x8>((h & 0x7fffu) << 13) * 0x1p112f;
    const u32x8 special = bits<u32x8>((h & 0x7c00u) == 0x7c00u);  // Inf and NaN
    return bits<f32x8>(bits<u32x8>(scaled) | (special & 0x7f800000u) | ((h & 0x8000u) << 16));
#endif
  }
  // to nearest, ties to even, beyond 65504 by more than half a step to Inf
  static inline __attribute__((always_inline)) Vector narrow(f32x8 v) {
    const u32x8 u = bits<u32x8>(v), magnitude = u & 0x7fffffffu;
    const u32x8 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    // adding 0.5 leaves a float32 whose last bit is worth 2^-24, half's smallest subnormal
    const u32x8 small = bits<u32x8>(bits<f32x8>(magnitude) + 0.5f) - 0x3f000000u;
    u32x8 half = select(bits<u32x8>(magnitude < 0x38800000u), small, normal);
    half = select(bits<u32x8>(magnitude >= 0x477ff000u), u32x8{} + 0x7c00u, half);
    half = select(bits<u32x8>(magnitude > 0x7f800000u), u32x8{} + 0x7e00u, half);
    return lower(half | ((u & 0x80000000u) >> 16));
  }
};

template <class T>
inline __attribute__((always_inline)) f32x8 load_wide(const typename T::Scalar* from) {
  return T::widen(load<typename T::Vector>(from));
}

// The first `count` of eight elements; the others come as zeros and are never touched in memory.
template <class T>
inline f32x8 load_wide(const typename T::Scalar* from, int64_t count) {
  typename T::Scalar buffer[LANES] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load_wide<T>(buffer);
}

// One of the two parts of sixteen elements: where a type's vectors come apart faster than they widen, the even or the
// odd ones (Order::parted), else the first eight or the last.
template <class T, int PART>
inline __attribute__((always_inline)) f32x8 load_part(const typename T::Scalar* from) {
  if constexpr (T::PARTED) return T::template part<PART>(load<u32x8>(from));
  return load_wide<T>(from + PART * LANES);
}

// Has a vector in a register of its own from here on: GCC would load it anew for every product that it is a factor of.
inline __attribute__((always_inline)) void hold(f32x8& value) {
#if defined(__AVX2__)
  asm("" : "+x"(value));
#else
  (void)value;
#endif
}

template <class T>
inline __attribute__((always_inline)) void store_narrow(typename T::Scalar* to, f32x8 value) {
  store(to, T::narrow(value));
}

template <class T>
inline void store_narrow(typename T::Scalar* to, f32x8 value, int64_t count) {
  typename T::Scalar buffer[LANES];
  store_narrow<T>(buffer, value);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

}  // namespace
