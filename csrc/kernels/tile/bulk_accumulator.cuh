// A tile of fp32 sums in global memory to which warpgroups of many CTAs add with the copy engine
// (sm_90). Its layout is the order in which the lanes of each warp hold their fragments, so that a
// warp's share is contiguous; only an accumulator of the same shape can read it back.
//
// Additions from registers (`red.global.add.v4.f32`) took a fifth of the backward's time on an
// H100: they go through the pipe that the products' operands need (docs/tuning.md).
#pragma once

#include <ptx/tma.cuh>

namespace jfa::tile {

// Reads what a lane has of sums in that layout, whose first four are at `sums`. kColumnTileFloats:
// from one column tile to the next.
template <int kColumnTileFloats = 128, class Acc>
__device__ __forceinline__ void read_sums(Acc& acc, const float* sums) {
#pragma unroll
  for (int n = 0; n < Acc::kColumnTiles; ++n) {
    const float4 values = *reinterpret_cast<const float4*>(sums + n * kColumnTileFloats);
    acc.values[0][n][0] = values.x;
    acc.values[0][n][1] = values.y;
    acc.values[0][n][2] = values.z;
    acc.values[0][n][3] = values.w;
  }
}

// Writes them.
template <int kColumnTileFloats = 128, class Acc>
__device__ __forceinline__ void write_sums(const Acc& acc, float* sums) {
#pragma unroll
  for (int n = 0; n < Acc::kColumnTiles; ++n)
    *reinterpret_cast<float4*>(sums + n * kColumnTileFloats) = make_float4(
        acc.values[0][n][0], acc.values[0][n][1], acc.values[0][n][2], acc.values[0][n][3]);
}

// Acc: what one warpgroup adds or loads.
template <class Acc>
struct BulkAccumulator {
  static_assert(Acc::kRowTiles == 1, "a warp of a warpgroup holds one 16-row block");
  static constexpr int kWarpFloats = Acc::kColumnTiles * 32 * 4;
  static constexpr int kBytes = 4 * kWarpFloats * 4;

  float* data;

  static __device__ __forceinline__ int thread_offset() {
    return static_cast<int>(threadIdx.x) % 128 / 32 * kWarpFloats +
           static_cast<int>(threadIdx.x) % 32 * 4;
  }

  // An addition goes by way of kBytes of shared memory: stage() by the warpgroup and a proxy fence
  // by each of its threads, then send() by one thread that knows of them. The copy, of that
  // thread's open bulk group, may read what is staged until bulk_wait_read.
  // Threads: a whole warpgroup.
  static __device__ __forceinline__ void stage(const Acc& acc, unsigned char* staging) {
    write_sums(acc, reinterpret_cast<float*>(staging) + thread_offset());
  }
  // Threads: one.
  __device__ __forceinline__ void send(const unsigned char* staging) const {
    ptx::bulk_reduce_add(data, reinterpret_cast<const float*>(staging), kBytes);
  }

  __device__ __forceinline__ void load(Acc& acc) const { read_sums(acc, data + thread_offset()); }
};

}  // namespace jfa::tile
