// What lets a kernel start before the one ahead of it in the stream has ended (sm_90, PTX ISA
// 9.7.13.13). Without effect where it was not launched so, and on older devices, where it never is.
#pragma once

namespace jfa::ptx {

// Lets the next kernel start as soon as all CTAs of this one have come here or ended.
__device__ __forceinline__ void start_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernel before has ended and all that it wrote can be read.
__device__ __forceinline__ void await_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace jfa::ptx
