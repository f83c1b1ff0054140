// An fp32 accumulator that waits in shared memory for more to be added. Its layout is the order in
// which the threads of a warpgroup hold their fragments: each reads and writes its own words, 16
// bytes at a time and side by side, whichever warpgroup it belongs to.
#pragma once

#include <ptx/special_register.cuh>
#include <tile/bulk_accumulator.cuh>

namespace jfa::tile {

template <class Acc>
struct SharedSums {
  static_assert(Acc::kRowTiles == 1, "a warp of a warpgroup holds one 16-row block");
  static constexpr int kColumnTileFloats = 128 * 4;  // four of each thread
  static constexpr int kBytes =
      Acc::kColumnTiles * kColumnTileFloats * static_cast<int>(sizeof(float));

  float* sums;  // this thread's

  __device__ __forceinline__ explicit SharedSums(unsigned char* memory)
      : sums(reinterpret_cast<float*>(memory) + ptx::reread_thread() % 128 * 4) {}

  __device__ __forceinline__ void load(Acc& acc) const { read_sums<kColumnTileFloats>(acc, sums); }
  __device__ __forceinline__ void store(const Acc& acc) const {
    write_sums<kColumnTileFloats>(acc, sums);
  }
};

}  // namespace jfa::tile
