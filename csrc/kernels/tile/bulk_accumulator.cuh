// A tile of fp32 sums in global memory to which warpgroups of many CTAs add with the copy engine
// (sm_90). Its layout is the order in which the lanes of each warp hold their fragments, so that a
// warp's share is contiguous; only an accumulator of the same shape can read it back.
//
// Additions from registers (`red.global.add.v4.f32`) took a fifth of the backward's time on an
// H100: they go through the pipe that the products' operands need (docs/tuning.md).
#pragma once

#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>

namespace jfa::tile {

// Reads what a lane has of sums in that layout, whose first four are at `sums`.
template <class Acc>
__device__ __forceinline__ void read_sums(Acc& acc, const float* sums) {
#pragma unroll
  for (int n = 0; n < Acc::kColumnTiles; ++n) {
    const float4 values = *reinterpret_cast<const float4*>(sums + n * 128);
    acc.values[0][n][0] = values.x;
    acc.values[0][n][1] = values.y;
    acc.values[0][n][2] = values.z;
    acc.values[0][n][3] = values.w;
  }
}

// Acc: what one warpgroup adds or loads.
template <class Acc>
struct BulkAccumulator {
  static_assert(Acc::kRowTiles == 1, "a warp of a warpgroup holds one 16-row block");
  static constexpr int kWarpFloats = Acc::kColumnTiles * 32 * 4;
  static constexpr int kWarpBytes = kWarpFloats * 4;

  float* data;  // of the warpgroup

  static __device__ __forceinline__ int warp_offset() {
    return static_cast<int>(threadIdx.x) % 128 / 32 * kWarpFloats;
  }
  static __device__ __forceinline__ int lane_offset() {
    return static_cast<int>(threadIdx.x) % 32 * 4;
  }

  // An addition goes by way of the warp's own kWarpBytes of shared memory, in two steps, so that
  // products can be started between them: stage() frees the accumulator's registers, send() starts
  // the copy, which may read what is staged until the warp's next stage() or bulk_wait_read.
  // Threads: a whole warp, the same at each call.
  static __device__ __forceinline__ void stage(const Acc& acc, unsigned char* staging) {
    float* const staged = reinterpret_cast<float*>(staging);
    if (ptx::elect_lane()) ptx::bulk_wait_read();
    __syncwarp();  // the last addition has read what it staged
#pragma unroll
    for (int n = 0; n < Acc::kColumnTiles; ++n)
      *reinterpret_cast<float4*>(staged + lane_offset() + n * 128) = make_float4(
          acc.values[0][n][0], acc.values[0][n][1], acc.values[0][n][2], acc.values[0][n][3]);
  }
  __device__ __forceinline__ void send(const unsigned char* staging) const {
    ptx::fence_async_proxy();
    __syncwarp();  // all lanes have staged
    if (ptx::elect_lane()) {
      ptx::bulk_reduce_add(data + warp_offset(), reinterpret_cast<const float*>(staging),
                           kWarpBytes);
      ptx::bulk_commit();
    }
  }

  __device__ __forceinline__ void load(Acc& acc) const {
    read_sums(acc, data + warp_offset() + lane_offset());
  }
};

}  // namespace jfa::tile
