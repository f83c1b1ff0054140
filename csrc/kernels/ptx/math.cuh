// Single-instruction transcendental functions, and the constants and tests that go with them.
#pragma once

namespace jfa::ptx {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ bool is_nan(float x) { return x != x; }

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < infinity(); }

// 2**x; relative error 2**-22, denormal results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A word whose lowest `count` bits are set, all of them from 32 on. Needs: count >= 0.
__device__ __forceinline__ unsigned low_bits(int count) {
  unsigned bits;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(count));
  return bits;
}

}  // namespace jfa::ptx
