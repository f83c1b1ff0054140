// Special registers read anew at every use. A value derived from threadIdx or blockIdx is hoisted
// out of loops and kept in a register; main loops that use all 255 have none to spare for it.
#pragma once

namespace jfa::ptx {

__device__ __forceinline__ int reread_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ unsigned reread_cta() {
  unsigned cta;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cta));
  return cta;
}

__device__ __forceinline__ int reread_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The same value, of which the compiler knows nothing: what follows from it is worked out where it
// is used, not before.
__device__ __forceinline__ unsigned opaque(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace jfa::ptx
