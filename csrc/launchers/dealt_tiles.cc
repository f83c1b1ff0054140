#include "launchers/dealt_tiles.h"

#include <algorithm>

namespace jax_flash_attn::launchers {
namespace {

// Of the keys and values that are walked again and again, so much stays in L2 beside the rest: of
// 50 MB on the smallest Hopper part, a little more than half. Short sequences wait for memory, and
// are up to 12% faster where less is kept at a time; longer ones are up to 5% slower, since a
// section of few tiles leaves multiprocessors idle at its end (docs/tuning.md).
std::int64_t bytes_in_l2(std::int64_t seqlen) {
  constexpr std::int64_t kShort = 1024;
  return std::int64_t{seqlen <= kShort ? 16 : 32} << 20;
}

// Heads of which the tensors that all their tiles read fit into L2 together.
int section_heads(std::int64_t heads, std::int64_t bytes_of_head, std::int64_t bytes_in_l2) {
  const std::int64_t fitting = bytes_in_l2 / std::max<std::int64_t>(1, bytes_of_head);
  return static_cast<int>(std::min(heads, std::max<std::int64_t>(1, fitting)));
}

int tiles_of(std::int64_t seqlen, int tile) { return static_cast<int>((seqlen + tile - 1) / tile); }

}  // namespace

jfa::DealtTiles deal_query_tiles(const AttentionShape& shape, int tile_q) {
  // Heads of a group share their keys.
  const int group = static_cast<int>(shape.group_heads());
  const int key_heads =
      section_heads(shape.batch * shape.heads_k, 4 * shape.seqlen_k * shape.head_dim,
                    bytes_in_l2(shape.seqlen_k));
  return {tiles_of(shape.seqlen_q, tile_q), key_heads * group};
}

jfa::DealtTiles deal_key_tiles(const AttentionShape& shape, int tile_k) {
  return {tiles_of(shape.seqlen_k, tile_k),
          section_heads(shape.batch * shape.heads_k,
                        4 * shape.seqlen_q * shape.head_dim * shape.group_heads(),
                        bytes_in_l2(shape.seqlen_q))};
}

}  // namespace jax_flash_attn::launchers
