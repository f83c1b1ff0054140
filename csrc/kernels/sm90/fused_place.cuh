// The order of the key tiles of the fused backward, in which CTAs take one after the other.
//
// A group is a key head with the query heads that read it, or a part of one
// (attention/query_group.cuh). The key tiles of a group follow each other, so that CTAs read the
// same queries from L2. The last groups' come in the order of their places in the head instead:
// under a causal mask the first tiles of a head take longest, and what is taken last is then the
// least.
//
// deterministic: from the last key tile to the first, in which order they add to a query tile.
// Without a mask a key tile can't add before the one behind it has, so that they are to start some
// time apart: key tiles of so many groups alternate that those of one do.
#pragma once

#include <attention/head_address.cuh>
#include <params/backward_params.h>
#include <ptx/atomic.cuh>
#include <ptx/grid_dependency.cuh>

namespace jfa::sm90 {

// Of one group.
template <class Config>
__device__ __forceinline__ unsigned group_key_tiles(const Sm90FusedBackwardParams& params) {
  return (params.backward.attention.seqlen_k + Config::kTileK - 1) / Config::kTileK;
}

template <class Config>
__device__ __forceinline__ unsigned fused_key_tiles(const Sm90FusedBackwardParams& params) {
  const AttentionParams& attention = params.backward.attention;
  return group_key_tiles<Config>(params) * (attention.batch * attention.heads_k);
}

// The key tile that comes at an index.
template <class Config>
__device__ __forceinline__ attention::TilePlace fused_place(const Sm90FusedBackwardParams& params,
                                                            unsigned index) {
  const AttentionParams& attention = params.backward.attention;
  const unsigned tiles = group_key_tiles<Config>(params);
  if constexpr (Config::kDeterministic) {
    const unsigned first_group =
        index / (params.alternating_groups * tiles) * params.alternating_groups;
    const unsigned groups =
        min(params.alternating_groups, attention.batch * attention.heads_k - first_group);
    const unsigned in_block = index - first_group * tiles;
    index = (first_group + in_block % groups) * tiles + tiles - 1 - in_block / groups;
  } else if constexpr (Config::kWindowed) {
    const unsigned first_group = attention.batch * attention.heads_k - params.last_groups;
    const unsigned first = first_group * tiles;
    if (index >= first) {
      const unsigned group = first_group + (index - first) % params.last_groups;
      index = group * tiles + (index - first) / params.last_groups;
    }
  }
  return attention::place_of(index, tiles, attention.heads_k);
}

// The indices that a CTA takes. Threads: one.
//
// All from a counter, so that every index below one that is taken belongs to a CTA that runs: not
// all CTAs of a grid need to, where other kernels hold multiprocessors, and who waits for an index
// that nobody computes waits forever. Where each CTA takes one, it is its own number, in which
// order the hardware starts them, and nobody may have cleared the counter.
template <class Config>
__device__ __forceinline__ unsigned take_key_tile(const Sm90FusedBackwardParams& params,
                                                  bool is_first) {
  const unsigned tiles = fused_key_tiles<Config>(params);
  if (gridDim.x >= tiles) return is_first ? blockIdx.x : tiles;
  ptx::await_previous_grid();  // which has cleared the counter
  return ptx::add_relaxed(params.backward.taken, 1);
}

}  // namespace jfa::sm90
