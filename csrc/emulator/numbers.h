// The number formats of the tensor cores, in integer arithmetic: no compiler support, no table, independent of the processor's
// treatment of subnormals.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastattn::emulator {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr uint32_t SIGN = 0x80000000, INFINITE = 0x7f800000, NOT_A_NUMBER = 0x7fffffff;

// fp16: 5 bits of exponent with bias 15, 10 of fraction.
inline float half_to_float(uint16_t half) {
  uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return float_of(fraction ? NOT_A_NUMBER : sign | INFINITE);
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
  return float_of(sign | (exponent + 127 - 15) << 23 | fraction << 13);
}

// To nearest even. NaN becomes 0x7fff, as on a GPU.
inline uint16_t float_to_half(float x) {
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & ~SIGN;
  if (magnitude > INFINITE) return 0x7fff;
  if (magnitude >= bits_of(65520.0f)) return static_cast<uint16_t>(sign | 0x7c00);  // halfway between the largest half and 2^16
  if (magnitude >= bits_of(0x1p-14f)) {
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - ((127 - 15) << 23)) >> 13);
  }
  if (magnitude < bits_of(0x1p-25f)) return static_cast<uint16_t>(sign);
  // A subnormal half counts in units of 2^-24: x = significand 2^(exponent - 150) = significand 2^-shift units, 14 <= shift <=
  // 25.
  uint32_t shift = 126 - (magnitude >> 23), significand = (magnitude & 0x7fffff) | 0x800000;
  uint32_t units = significand >> shift, rest = significand & ((1u << shift) - 1), tie = 1u << (shift - 1);
  if (rest > tie || (rest == tie && (units & 1))) units++;
  return static_cast<uint16_t>(sign | units);
}

// bf16 is the upper half of an fp32.
inline float bfloat16_to_float(uint16_t bfloat16) { return float_of(static_cast<uint32_t>(bfloat16) << 16); }

inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits = bits_of(x);
  if ((bits & ~SIGN) > INFINITE) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// tf32 is an fp32 with 10 bits of fraction. Conversion rounds ties away from zero; the tensor cores ignore the low 13 bits.
inline uint32_t float_to_tf32(float x) {
  uint32_t bits = bits_of(x);
  if ((bits & ~SIGN) > INFINITE) return NOT_A_NUMBER;
  return (bits + 0x1000) & ~0x1fffu;
}

inline float tf32_operand(uint32_t bits) { return float_of(bits & ~0x1fffu); }

// `ftz`: subnormals count as zero of the same sign.
inline float flush_subnormal(float x) {
  uint32_t bits = bits_of(x);
  return (bits & INFINITE) == 0 ? float_of(bits & SIGN) : x;
}

}  // namespace fastattn::emulator
