// CTAs that run at one time, on multiprocessors beside each other, and reach into each other's
// shared memory (sm_90, PTX ISA 5.2 and 9.7.13).
#pragma once

namespace jfa::ptx {

// Which CTA of its cluster this one is.
__device__ __forceinline__ int cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// An address of this CTA's shared memory without the number of the CTA, which is in its upper bits
// in a cluster (seen, not documented): matrix descriptors have other fields there.
__device__ __forceinline__ unsigned shared_offset(unsigned shared) { return shared & 0xffffffu; }

// Where the CTA of that rank has what this one has at `shared`.
__device__ __forceinline__ unsigned shared_of_cta(unsigned shared, int rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// A barrier of all threads of all CTAs of the cluster that have not ended. Shared memory written
// before can be read behind it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// Arrives at a barrier of another CTA. barrier: from shared_of_cta. Orders no stores of this CTA:
// what it hands over there, the copy engine brings.
__device__ __forceinline__ void mbarrier_arrive_remote(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Starts the copy of contiguous bytes to the shared memory of another CTA; they count towards the
// phase of a barrier there. target, barrier: from shared_of_cta. Threads: one. Needs: the writers'
// fence_async_proxy() and a barrier before it; addresses and size multiples of 16.
__device__ __forceinline__ void bulk_copy_remote(unsigned target, unsigned shared, int bytes,
                                                 unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(target),
      "r"(shared), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace jfa::ptx
