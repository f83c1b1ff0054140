// A tile of fp32 sums in global memory to which many CTAs add. Its layout is the order in which
// the threads of one warp layout hold their fragments, so every reduction and every load of a warp
// is contiguous; only kernels with the same layout can read it back.
#pragma once

#include <ptx/atomic.cuh>

namespace jfa::tile {

template <int kThreads>
struct GlobalAccumulator {
  float* data;

  // Element i of fragment f of this thread. With 16-byte reductions (sm_90 and later) a thread's
  // four elements lie together; with 4-byte ones the 32 lanes of each element do.
#if __CUDA_ARCH__ >= 900
  static constexpr int kElementStride = 1;
  __device__ __forceinline__ float* fragment(int f) const {
    return data + (f * kThreads + threadIdx.x) * 4;
  }
#else
  static constexpr int kElementStride = kThreads;
  __device__ __forceinline__ float* fragment(int f) const {
    return data + f * kThreads * 4 + threadIdx.x;
  }
#endif

  template <class Acc>
  __device__ __forceinline__ void add(const Acc& acc) const {
#pragma unroll
    for (int m = 0; m < Acc::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < Acc::kColumnTiles; ++n) {
        float* target = fragment(m * Acc::kColumnTiles + n);
#if __CUDA_ARCH__ >= 900
        ptx::reduce_add_4(target, acc.values[m][n]);
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) atomicAdd(target + i * kElementStride, acc.values[m][n][i]);
#endif
      }
  }

  template <class Acc>
  __device__ __forceinline__ void load(Acc& acc) const {
#pragma unroll
    for (int m = 0; m < Acc::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < Acc::kColumnTiles; ++n) {
        const float* source = fragment(m * Acc::kColumnTiles + n);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc.values[m][n][i] = source[i * kElementStride];
      }
  }
};

}  // namespace jfa::tile
