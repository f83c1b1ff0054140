// Which queries a key head of a backward call has dk and dv of: those of the query heads of its
// group, or, in calls with more key heads than query heads (jax_flash_attn/_key_parts.py), of the
// query tiles that see a key tile its part, one of several key heads' in a row. And which keys:
// where heads come in parts, several in a row share a head of k and v.
#pragma once

#include <attention/visible_range.cuh>
#include <params/backward_params.h>

namespace jfa::attention {

template <class Config>
__device__ __forceinline__ int group_heads(const AttentionParams& params) {
  const int group = params.heads / params.heads_k;
  return Config::kHeadDim > kPartHeadDim ? group : max(1, group);
}

// How many key heads in a row share a query head.
__device__ __forceinline__ int query_parts(const AttentionParams& params) {
  return max(1, params.heads_k / params.heads);
}

__device__ __forceinline__ int first_query_head(const AttentionParams& params, int head_k) {
  return __builtin_expect(params.heads >= params.heads_k, true)
             ? head_k * (params.heads / params.heads_k)
             : head_k / (params.heads_k / params.heads);
}

// Of the query tiles that see a key tile. Kernels of wide heads, which have no registers for it,
// are given no parts of query heads.
template <class Config>
__device__ __forceinline__ Range own_query_tiles(const AttentionParams& params, int head_k,
                                                 const Range& tiles) {
  if constexpr (Config::kHeadDim > kPartHeadDim) return tiles;
  if (__builtin_expect(params.heads >= params.heads_k, true)) return tiles;
  const int parts = params.heads_k / params.heads;
  const int part = head_k % parts;
  const int count = tiles.end - tiles.begin;
  return {tiles.begin + part * count / parts, tiles.begin + (part + 1) * count / parts};
}

// The head of k and v that a key head of the call reads. Nearly always the same: a comparison in
// place of a division, for which a CTA that starts would wait.
__device__ __forceinline__ int own_key_head(const BackwardParams& params, int head_k) {
  return __builtin_expect(params.key_parts == 1, true) ? head_k : head_k / params.key_parts;
}

// How many query heads read a head of k and v.
__device__ __forceinline__ int key_head_group(const BackwardParams& params) {
  return params.attention.heads * params.key_parts / params.attention.heads_k;
}

}  // namespace jfa::attention
