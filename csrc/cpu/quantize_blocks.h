// Codes of a table of sixteen values, for blocks that share a scale.
#pragma once

#include "simd.h"

namespace {

// How many of the table's midpoints are below a scaled value.
inline uint8_t count_below(float value, const float* midpoints) {
  uint8_t count = 0;
  for (int k = 0; k < pissa::cpu::MIDPOINTS; ++k) count += value > midpoints[k];
  return count;
}

inline float clamped(float value) { return value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value; }

// Blocks [begin, end) of `count` float32 values. The arithmetic is that of bitsandbytes, to the bit: whole blocks are
// multiplied by the reciprocal of their scale, the values of a last block that is shorter are divided by it.
void quantize_blocks(const float* values, int64_t count, const pissa::cpu::Table& table, int64_t block, int64_t begin,
                     int64_t end, uint8_t* codes, float* scales) {
  constexpr int CHAINS = 4;
  constexpr float SMALLEST = 1e-38f;
  f32x8 midpoints[pissa::cpu::MIDPOINTS];
  for (int k = 0; k < pissa::cpu::MIDPOINTS; ++k) midpoints[k] = f32x8{} + table.midpoints[k];
  for (int64_t index = begin; index < end; ++index) {
    const float* const from = values + index * block;
    uint8_t* const to = codes + index * block / 2;
    const int64_t length = count - index * block < block ? count - index * block : block;
    float largest = 0.0f;
    for (int64_t i = 0; i < length; ++i) {
      const float magnitude = __builtin_fabsf(from[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    if (length < block) {
      largest = largest > SMALLEST ? largest : SMALLEST;
      scales[index] = largest;
      for (int64_t i = 0; i + 1 < length; i += 2) {
        const uint8_t first = count_below(clamped(from[i] / largest), table.midpoints);
        const uint8_t second = count_below(clamped(from[i + 1] / largest), table.midpoints);
        to[i / 2] = static_cast<uint8_t>(table.codes[first] << 4 | table.codes[second]);
      }
      continue;
    }
    scales[index] = largest;
    const float inverse = 1.0f / (largest > SMALLEST ? largest : SMALLEST);
    for (int64_t i = 0; i < block; i += CHAINS * LANES) {
      u32x8 counts[CHAINS];
      for (int chain = 0; chain < CHAINS; ++chain) {
        // values that rounding has put beyond ±1 have the same code as those that are there
        const f32x8 scaled = load<f32x8>(from + i + chain * LANES) * inverse;
        u32x8 below{};
        for (int k = 0; k < pissa::cpu::MIDPOINTS; ++k) below -= bit_cast<u32x8>(scaled > midpoints[k]);
        counts[chain] = below;
      }
      for (int chain = 0; chain < CHAINS; ++chain)
        for (int lane = 0; lane < LANES; lane += 2)
          to[(i + chain * LANES + lane) / 2] =
              static_cast<uint8_t>(table.codes[counts[chain][lane]] << 4 | table.codes[counts[chain][lane + 1]]);
    }
  }
}

}  // namespace
