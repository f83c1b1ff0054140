// An fp32 accumulator that waits in shared memory for more to be added. Its layout is the order in
// which the threads of a warpgroup hold their fragments: each reads and writes its own words, 16
// bytes at a time and side by side, whichever warpgroup it belongs to.
#pragma once

#include <ptx/special_register.cuh>
#include <tile/fragment.cuh>

namespace jfa::tile {

template <class Acc>
struct SharedSums {
  static_assert(Acc::kRowTiles == 1, "a warp of a warpgroup holds one 16-row block");
  static constexpr int kBytes = Acc::kColumnTiles * 128 * static_cast<int>(sizeof(float4));

  float4* words;  // this thread's

  __device__ __forceinline__ explicit SharedSums(unsigned char* memory)
      : words(reinterpret_cast<float4*>(memory) + ptx::reread_thread() % 128) {}

  __device__ __forceinline__ void load(Acc& acc) const {
#pragma unroll
    for (int n = 0; n < Acc::kColumnTiles; ++n) {
      const float4 values = words[n * 128];
      acc.values[0][n][0] = values.x;
      acc.values[0][n][1] = values.y;
      acc.values[0][n][2] = values.z;
      acc.values[0][n][3] = values.w;
    }
  }
  __device__ __forceinline__ void store(const Acc& acc) const {
#pragma unroll
    for (int n = 0; n < Acc::kColumnTiles; ++n)
      words[n * 128] = make_float4(acc.values[0][n][0], acc.values[0][n][1], acc.values[0][n][2],
                                   acc.values[0][n][3]);
  }
};

}  // namespace jfa::tile
