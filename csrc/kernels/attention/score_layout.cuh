// Where the elements of a warp's score accumulator lie in the score matrix. Both layouts answer for
// element i of accumulator (m, n); a thread owns {q, q + 8} x {k, k + 8} of every 16x16 block in
// either.
#pragma once

#include <ptx/special_register.cuh>

namespace jfa::attention {

// Rows are queries. Row tile m covers queries from kRowStride * m on, column pair p keys from
// kColumnStride * p on.
template <int kRowStride, int kColumnStride>
struct ScoreLayout {
  static constexpr bool kTransposed = false;
  int first_query;  // of this lane
  int first_key;

  // Threads: a whole warp, with the first query and key of the warp's first 16x16 block.
  __device__ __forceinline__ ScoreLayout(int warp_query, int warp_key) {
    const int lane = ptx::reread_lane();
    first_query = warp_query + lane / 4;
    first_key = warp_key + lane % 4 * 2;
  }

  __device__ __forceinline__ int query(int m, int /*n*/, int i) const {
    return first_query + m * kRowStride + i / 2 * 8;
  }
  __device__ __forceinline__ int key(int /*m*/, int n, int i) const {
    return first_key + column_offset(n, i);
  }

  static __device__ constexpr int column_offset(int n, int i) {
    return n / 2 * kColumnStride + n % 2 * 8 + i % 2;
  }
  // How many column offsets are at most `limit`; none are where that is negative.
  static __device__ __forceinline__ int columns_up_to(int limit) {
    const int rest = limit & (kColumnStride - 1);
    static_assert((kColumnStride & (kColumnStride - 1)) == 0, "the rest is taken by bits");
    return limit < 0 ? 0 : limit / kColumnStride * 4 + 1 + (rest >= 1) + (rest >= 8) + (rest >= 9);
  }
};

// Rows are keys: scores^T of one 16-row block.
struct TransposedScoreLayout {
  static constexpr bool kTransposed = true;
  int first_query;  // of this lane
  int first_key;

  // Threads: a whole warp, with the first query and key of the warp's first 16x16 block.
  __device__ __forceinline__ TransposedScoreLayout(int warp_query, int warp_key) {
    const int lane = ptx::reread_lane();
    first_query = warp_query + lane % 4 * 2;
    first_key = warp_key + lane / 4;
  }

  __device__ __forceinline__ int query(int /*m*/, int n, int i) const {
    return first_query + column_offset(n, i);
  }
  __device__ __forceinline__ int key(int m, int /*n*/, int i) const {
    return first_key + m * 16 + i / 2 * 8;
  }

  static __device__ constexpr int column_offset(int n, int i) { return n * 8 + i % 2; }
  static __device__ __forceinline__ int columns_up_to(int limit) {
    return limit < 0 ? 0 : limit / 8 * 2 + 1 + (limit % 8 >= 1);
  }
};

}  // namespace jfa::attention
