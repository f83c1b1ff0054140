// The order of the key tiles of the fused backward.
//
// A group is a key head with the query heads that read it. The CTAs of a group, one for each key
// tile, follow each other in the grid, so that they read the same queries from L2. The last groups'
// come in the order of their key tiles instead: under a causal mask the first tiles of a head take
// longest, and the last CTAs of the grid then have the least to do.
#pragma once

#include <attention/head_address.cuh>
#include <params/backward_params.h>
#include <ptx/special_register.cuh>

namespace jfa::sm90 {

// The key tile of this CTA.
template <class Config>
__device__ __forceinline__ attention::TilePlace fused_place(const Sm90FusedBackwardParams& params) {
  const AttentionParams& attention = params.backward.attention;
  const unsigned tiles = (attention.seqlen_k + Config::kTileK - 1) / Config::kTileK;
  unsigned index = ptx::reread_cta();
  if constexpr (Config::kWindowed) {
    const unsigned first_group = attention.batch * attention.heads_k - params.last_groups;
    const unsigned first = first_group * tiles;
    if (index >= first) {
      const unsigned group = first_group + (index - first) % params.last_groups;
      index = group * tiles + (index - first) / params.last_groups;
    }
  }
  return attention::place_of(index, tiles, attention.heads_k);
}

}  // namespace jfa::sm90
