// Which probabilities dropout keeps: a function of the Philox key of (batch, head) and of the
// query and key index alone, so that it is the same in both passes, for every tiling, and in
// jax_flash_attn/dropout.py.
#pragma once

#include <params/attention_params.h>

namespace jfa::attention {

// One Philox4x32 call with 7 rounds (Salmon et al. 2011) serves the four scores
// {q, q + 8} x {k, k + 8} of a 16x16 block, which one thread owns in every accumulator layout.
struct Dropout {
  unsigned key[2];
  unsigned threshold;

  __device__ __forceinline__ Dropout(const AttentionParams& params, int batch, int head)
      : threshold(params.dropout_threshold) {
    const uint2* keys = static_cast<const uint2*>(params.dropout_keys.data);
    const uint2 words =
        keys[static_cast<long long>(batch % params.dropout_keys.batches) * params.heads + head];
    key[0] = words.x;
    key[1] = words.y;
  }

  // kept[2 * a + b] tells whether the element in half a of a block's rows and half b of its columns
  // is kept; (query, key) may be any of the four.
  __device__ __forceinline__ void keep(bool (&kept)[4], int query, int key_index) const {
    unsigned words[4] = {block_index(query), block_index(key_index), 0u, 0u};
    unsigned round_key[2] = {key[0], key[1]};
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const unsigned high0 = __umulhi(0xD2511F53u, words[0]);
      const unsigned low0 = 0xD2511F53u * words[0];
      const unsigned high1 = __umulhi(0xCD9E8D57u, words[2]);
      const unsigned low1 = 0xCD9E8D57u * words[2];
      words[0] = high1 ^ words[1] ^ round_key[0];
      words[1] = low1;
      words[2] = high0 ^ words[3] ^ round_key[1];
      words[3] = low0;
      round_key[0] += 0x9E3779B9u;
      round_key[1] += 0xBB67AE85u;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i] = words[i] >= threshold;
  }

  // Calls visit(side, i, kept) for the elements i of the two accumulators (m, 2 * pair + side).
  template <class Layout, class Visit>
  __device__ __forceinline__ void for_pair(const Layout& layout, int m, int pair,
                                           Visit visit) const {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      bool kept[4];
      keep(kept, layout.query(m, 2 * pair, column), layout.key(m, 2 * pair, column));
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int side = 0; side < 2; ++side)
          visit(side, 2 * half + column,
                kept[Layout::kTransposed ? 2 * side + half : 2 * half + side]);
    }
  }

  __device__ __forceinline__ bool is_kept(int query, int key_index) const {
    bool kept[4];
    keep(kept, query, key_index);
    const bool right = key_index / 8 % 2 != 0;
    return query / 8 % 2 != 0 ? (right ? kept[3] : kept[2]) : (right ? kept[1] : kept[0]);
  }

  // Calls visit(m, n, i, kept) for every element of a score accumulator.
  template <class Acc, class Layout, class Visit>
  __device__ __forceinline__ void for_each(const Layout& layout, Visit visit) const {
#pragma unroll
    for (int m = 0; m < Acc::kRowTiles; ++m)
#pragma unroll
      for (int pair = 0; pair < Acc::kColumnPairs; ++pair)
        for_pair(layout, m, pair,
                 [&](int side, int i, bool kept) { visit(m, 2 * pair + side, i, kept); });
  }

 private:
  // Sixteen indices share eight counters: index and index + 8 of a block of 16 the same one.
  static __device__ __forceinline__ unsigned block_index(int index) {
    return static_cast<unsigned>(index / 16 * 8 + index % 8);
  }
};

}  // namespace jfa::attention
