// Asynchronous copies from global to shared memory (PTX ISA 9.7.9.25, sm_80 and later).
#pragma once

namespace jfa::ptx {

// Copies 16 bytes, or writes 16 zero bytes and reads nothing when `valid` is false.
// Needs: both addresses aligned to 16 bytes.
__device__ __forceinline__ void cp_async_16(unsigned shared, const void* global, bool valid) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace jfa::ptx
