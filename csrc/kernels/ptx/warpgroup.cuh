// What warps of one CTA need to work in different roles (sm_90).
#pragma once

namespace jfa::ptx {

// Registers per thread move between warpgroups (PTX ISA 9.7.19.5). Threads: a whole warpgroup.
// Needs: a multiple of 8, and __launch_bounds__ with a CTA count, without which it is ignored.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier `id` (1 to 15; 0 is __syncthreads) completes when `threads` threads have arrived. Only
// barrier_sync waits for it.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same, and tells whether any of the threads came with `value`.
__device__ __forceinline__ bool barrier_any(int id, int threads, bool value) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, any;\n"
      "setp.ne.s32 mine, %3, 0;\n"
      "barrier.cta.red.or.pred any, %1, %2, mine;\n"
      "selp.s32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(value))
      : "memory");
  return any != 0;
}

// True in one lane of a whole warp. The compiler then knows that one thread runs what follows,
// which a comparison with threadIdx does not tell it.
__device__ __forceinline__ bool elect_lane() {
  unsigned elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// The same value in every lane of a warp, held in a uniform register.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

}  // namespace jfa::ptx
