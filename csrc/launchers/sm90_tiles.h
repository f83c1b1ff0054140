// The tile table of the sm90 family: which tiles compute a call on Hopper.
#pragma once

#include <string>

#include "launchers/attention_spec.h"
#include "launchers/target.h"
#include "runtime/status.h"

namespace jax_flash_attn::launchers::sm90 {

struct ForwardTiles {
  int tile_q;  // 64 for each consumer warpgroup
  int tile_k;
  int query_stages;
  int key_stages;
  int value_stages;
  int prob_buffers;  // 2: p v of a key tile runs beside the softmax of the next
};

struct BackwardTiles {
  int tile_q;
  int tile_k;  // 128; or 64, for sm90/wide_backward.cuh
  int query_stages;
  int dout_stages;
};

// kUnimplemented where no row serves.
runtime::StatusOr<ForwardTiles> forward_tiles(const AttentionSpec& spec,
                                              const AttentionShape& shape, const Target& target);

runtime::StatusOr<BackwardTiles> backward_tiles(const AttentionSpec& spec,
                                                const AttentionShape& shape, const Target& target);

// Dynamic shared memory and threads of the kernel built from these tiles (sm90/forward.cuh).
int forward_shared_bytes(const ForwardTiles& tiles, int head_dim);
int forward_threads(const ForwardTiles& tiles);
// Whether sm90/wide_backward.cuh is the kernel of these tiles, or sm90/backward.cuh.
inline bool is_wide(const BackwardTiles& tiles) { return tiles.tile_k == 64; }
// Of the main and the postprocess kernel.
int backward_shared_bytes(const BackwardTiles& tiles, int head_dim);
int backward_postprocess_shared_bytes(const BackwardTiles& tiles, int head_dim);
constexpr int kBackwardThreads = 384;
constexpr int kBackwardPostprocessThreads = 256;

std::string describe(const ForwardTiles& tiles);
std::string describe(const BackwardTiles& tiles);

}  // namespace jax_flash_attn::launchers::sm90
