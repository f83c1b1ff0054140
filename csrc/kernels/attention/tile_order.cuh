// The order in which persistent CTAs compute the query tiles of all heads, or the key tiles.
#pragma once

#include <attention/head_address.cuh>
#include <params/attention_params.h>
#include <ptx/special_register.cuh>

namespace jfa::attention {

// The tiles are dealt out like cards: round by round, one to each CTA. Without a mask they go head
// by head, so that CTAs that run together read the same keys from L2.
//
// Under a mask tiles differ in length. Heads are grouped into sections whose keys fit into L2
// together; in each the longest tiles go first, and every second round is dealt in reverse, so that
// who got the longest tile of a round gets the shortest of the next. A section starts a new round,
// since its first tiles are long again, and other CTAs than before are left out of its last one.
// Against handing each tile to the first CTA that is free, with a counter in memory, this loses 0
// to 1% in a model of the causal cells of the benchmark, and needs no memory that someone has to
// clear before each launch.
//
// kOfKeys: tiles are of keys and their heads. Under a causal mask the first one of a head is then
// the longest, where it is the last of the queries'. Heads come from the last to the first: what
// the kernel before read last, L2 still has.
//
// kClusterCtas: of CTAs that compute a tile together, as one.
template <class Config, bool kOfKeys = false, int kClusterCtas = 1>
struct TileOrder {
  const AttentionParams& params;
  const DealtTiles& tiles;
  int first_head = 0;  // of the section
  int first_cta = 0;   // that is dealt to, in the section
  int start = 0;       // of the round, in tiles of the section
  bool reversed = false;

  __device__ __forceinline__ TileOrder(const AttentionParams& attention, const DealtTiles& dealt)
      : params(attention), tiles(dealt) {
    skip_gaps();
  }

  __device__ __forceinline__ bool valid() const {
    if constexpr (Config::kWindowed) return first_head < heads();
    return index() < heads() * tiles.of_head;
  }

  __device__ __forceinline__ void advance() {
    next_round();
    skip_gaps();
  }

  // Needs: valid().
  __device__ __forceinline__ TilePlace place() const {
    int tile, head;
    if constexpr (Config::kWindowed) {
      const int size = section_size();
      tile = index() / size;
      if (!kOfKeys) tile = tiles.of_head - 1 - tile;
      head = first_head + index() % size;
    } else {
      tile = index() % tiles.of_head;
      head = index() / tiles.of_head;
    }
    if constexpr (kOfKeys) head = heads() - 1 - head;
    return {tile, head % heads_of_batch(), head / heads_of_batch()};
  }

 private:
  __device__ __forceinline__ int heads_of_batch() const {
    return kOfKeys ? params.heads_k : params.heads;
  }

  static __device__ __forceinline__ int dealt_ctas() {
    return static_cast<int>(gridDim.x) / kClusterCtas;
  }
  // Heads of the whole batch.
  __device__ __forceinline__ int heads() const { return params.batch * heads_of_batch(); }

  __device__ __forceinline__ int section_size() const {
    return min(tiles.section_heads, heads() - first_head);
  }

  __device__ __forceinline__ int index() const {
    const int ctas = dealt_ctas();
    int cta = ptx::reread_cta() / kClusterCtas;
    if constexpr (Config::kWindowed) {
      cta += first_cta;
      if (cta >= ctas) cta -= ctas;
      if (reversed) cta = ctas - 1 - cta;
    }
    return start + cta;
  }

  __device__ __forceinline__ void next_round() {
    start += dealt_ctas();
    if constexpr (Config::kWindowed) {
      reversed = !reversed;
      const int size = section_size() * tiles.of_head;
      if (start >= size) {
        first_cta = (first_cta + (start - size)) % dealt_ctas();
        start = 0;
        first_head += tiles.section_heads;
      }
    }
  }

  // The last round of a section may have no tile for this CTA.
  __device__ __forceinline__ void skip_gaps() {
    if constexpr (Config::kWindowed)
      while (valid() && index() >= section_size() * tiles.of_head) next_round();
  }
};

}  // namespace jfa::attention
