// Reductions into global memory and the flags that order CTAs.
#pragma once

namespace jfa::ptx {

#if __CUDA_ARCH__ >= 900
// global[0..3] += values, four separate fp32 additions with no order among threads.
// Needs: `global` aligned to 16 bytes. Source: PTX ISA 9.7.13.7 (vector red, sm_90).
__device__ __forceinline__ void reduce_add_4(float* global, const float (&values)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}
#endif

__device__ __forceinline__ int load_acquire(const int* flag) {
  int value;
  asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* flag, int value) {
  asm volatile("st.global.release.gpu.b32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// *flag += value, behind all that this thread has written or knows to be written.
__device__ __forceinline__ void add_release(int* flag, int value) {
  asm volatile("red.global.release.gpu.add.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Returns *counter and adds to it, in no order with anything else.
__device__ __forceinline__ int add_relaxed(int* counter, int value) {
  int before;
  asm volatile("atom.global.relaxed.gpu.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// Waits until *flag, which only grows, is `value`. What was written before its release can then be
// read by this thread.
__device__ __forceinline__ void await_flag(const int* flag, int value) {
  while (load_acquire(flag) < value) __nanosleep(100);
}

}  // namespace jfa::ptx
