// The two 16-bit input types, as raw words: conversions and the tensor core product.
#pragma once

namespace jfa::ptx {

struct BFloat16 {
  // Rounds to nearest even; `low` goes to the lower half.
  static __device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }

  static __device__ __forceinline__ float low(unsigned word) { return __uint_as_float(word << 16); }

  static __device__ __forceinline__ float high(unsigned word) {
    return __uint_as_float(word & 0xffff0000u);
  }

  // acc (16x8, fp32) += a (16x16) * b (16x8). Threads: a whole warp. Source: PTX ISA 9.7.14.5.
  static __device__ __forceinline__ void mma(float (&acc)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  static __device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }

  static __device__ __forceinline__ float low(unsigned word) {
    return half_to_float(static_cast<unsigned short>(word & 0xffffu));
  }

  static __device__ __forceinline__ float high(unsigned word) {
    return half_to_float(static_cast<unsigned short>(word >> 16));
  }

  static __device__ __forceinline__ void mma(float (&acc)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

 private:
  static __device__ __forceinline__ float half_to_float(unsigned short half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
  }
};

}  // namespace jfa::ptx
