// Where the elements of a warp's score accumulator lie in the score matrix.
#pragma once

#include <ptx/special_register.cuh>

namespace jfa::attention {

// Row tile m covers queries from kRowStride * m on, column pair p keys from kColumnStride * p on.
template <int kRowStride, int kColumnStride>
struct ScoreLayout {
  int first_query;  // of this lane
  int first_key;

  // Threads: a whole warp, with the first query and key of the warp's first 16x16 block.
  __device__ __forceinline__ ScoreLayout(int warp_query, int warp_key) {
    const int lane = ptx::reread_lane();
    first_query = warp_query + lane / 4;
    first_key = warp_key + lane % 4 * 2;
  }

  // Element i of accumulator (m, n).
  __device__ __forceinline__ int query(int m, int i) const {
    return first_query + m * kRowStride + i / 2 * 8;
  }
  __device__ __forceinline__ int key(int n, int i) const { return first_key + key_offset(n, i); }

  static __device__ constexpr int key_offset(int n, int i) {
    return n / 2 * kColumnStride + n % 2 * 8 + i % 2;
  }
};

}  // namespace jfa::attention
