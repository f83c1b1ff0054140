// Copies of boxes of a tensor between global and shared memory by the copy engine (PTX ISA
// 9.7.9.27, sm_90). What lies outside the tensor is read as zeros and not written.
#pragma once

#include <params/tensor_map.h>
#include <ptx/cache_policy.cuh>

namespace jfa::ptx {

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts the copy of a box to shared memory; its bytes count towards the barrier's phase.
// Threads: one.
__device__ __forceinline__ void tma_load(unsigned shared, const TensorMap& map, unsigned barrier,
                                         unsigned long long cache_policy, int column, int row,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(shared),
      "l"(&map), "r"(barrier), "l"(cache_policy), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Asks for a box to be brought to L2. Threads: one.
__device__ __forceinline__ void tma_prefetch(const TensorMap& map, int column, int row, int head,
                                             int batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(&map),
               "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

// Starts the copy of contiguous bytes to shared memory; they count towards the barrier's phase.
// Threads: one. Needs: addresses and size multiples of 16.
__device__ __forceinline__ void bulk_load(unsigned shared, const void* global, int bytes,
                                          unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// Asks for contiguous bytes to be brought to L2. Threads: one. Needs: multiples of 16.
__device__ __forceinline__ void bulk_prefetch(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// Starts the addition of contiguous floats in shared memory to as many in global memory, as part of
// this thread's open bulk group.
// Threads: one. Needs: the writers' fence_async_proxy() and a barrier before it; addresses and size
// multiples of 16.
__device__ __forceinline__ void bulk_reduce_add(float* global, const float* shared, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "r"(bytes)
      : "memory");
}

// The same as a copy. Threads: one. Needs: likewise.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "r"(bytes)
               : "memory");
}

// Starts the copy of a box from shared memory, likewise.
__device__ __forceinline__ void tma_store(const TensorMap& map, unsigned shared, int column,
                                          int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(shared), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the latest kPending of this thread's bulk groups have read their shared
// memory, which may then be reused.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until this thread's bulk groups have ended and what they wrote can be read.
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Orders reads and writes of global memory by threads and by the copy engine, either way.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Orders this thread's stores to shared memory before later reads of it by the copy engine and by
// wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace jfa::ptx
