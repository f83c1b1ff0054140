// Reads of what nobody writes while the kernel runs (ld.global.nc, PTX ISA 9.7.9.8). They may pass
// stores, and the compiler, which would save registers, does not put them off until they are used:
// many are on their way together.
#pragma once

namespace jfa::ptx {

__device__ __forceinline__ float load_constant(const float* address) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(address));
  return value;
}

// 16 bytes that no other warp of the CTA reads. Needs: an address aligned to 16 bytes.
__device__ __forceinline__ void load_constant_words(unsigned (&words)[4], const void* address,
                                                    unsigned long long cache_policy) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(address), "l"(cache_policy));
}

}  // namespace jfa::ptx
