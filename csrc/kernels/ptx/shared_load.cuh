// Reads of shared memory in the order in which they are written down.
#pragma once

namespace jfa::ptx {

// Two neighbours. Stays in front of a wait for products, where the compiler would move a plain read
// behind it, to where it is used.
__device__ __forceinline__ float2 load_shared_pair(unsigned address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
}

}  // namespace jfa::ptx
