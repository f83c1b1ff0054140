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
  int tile_k;
  int query_stages;
  int dout_stages;
};

// dk and dv by themselves, as BackwardTiles (tile_k 64 is for sm90/wide_key_gradient.cuh); and dq
// by itself, as ForwardTiles.
struct SplitBackwardTiles {
  int tile_q;
  int tile_k;
  int query_stages;
  int dout_stages;
  int dq_tile_q;
  int dq_tile_k;
  int dq_query_stages;  // of q and dout
  int dq_key_stages;
  int dq_value_stages;
};

// Of a backward on Hopper, each of which owns 64 keys where tiles have 128.
constexpr int kKeyConsumers = 2;

// Of a backward whose CTAs take whole heads (sm90/head_backward.cuh).
struct HeadBackwardTiles {
  int tile_q;
  int tile_k;
  int query_stages;
  int dout_stages;
  int head_tiles;  // query tiles of a key head, of all query heads that read it, that fit
  int passes;      // by which they come, at most
};

// Of a backward by clusters of CTAs (sm90/cluster_backward.cuh).
struct ClusterBackwardTiles {
  int tile_q;
  int tile_k;
  int query_stages;
  int dout_stages;
};
constexpr int kClusterCtas = 4;  // all but one with a key tile

// kUnimplemented where no row serves.
runtime::StatusOr<ForwardTiles> forward_tiles(const AttentionSpec& spec,
                                              const AttentionShape& shape, const Target& target);

runtime::StatusOr<BackwardTiles> backward_tiles(const AttentionSpec& spec,
                                                const AttentionShape& shape, const Target& target);

// Whether a call's dq is better computed by itself: two products more for each tile, but no sums in
// memory that kernels before and behind must clear and round, and one order of additions.
bool splits_backward(const AttentionSpec& spec, const AttentionShape& shape, const Target& target);

// Whether a short causal call has so few key tiles that it is better fused nevertheless. Of each
// call, in little time.
bool suits_one_round(const AttentionSpec& spec, const AttentionShape& shape, int multiprocessors);

runtime::StatusOr<HeadBackwardTiles> head_backward_tiles(const AttentionSpec& spec,
                                                         const AttentionShape& shape,
                                                         const Target& target);

// kUnimplemented where a key head has more query tiles than fit.
runtime::Status check_head_fits(int head_tiles, int tile_q, const AttentionShape& shape);

// Whether the CTAs of a backward better take whole heads, as far as the shape goes: dq of one fits
// into shared memory, and there are enough for the multiprocessors. Of each call, in little time.
bool suits_heads(const AttentionSpec& spec, const AttentionShape& shape, int multiprocessors);
// Of how many key tiles, from the first on, dk and dv wait in the workspace between passes.
std::int64_t head_partial_tiles(const AttentionSpec& spec, const AttentionShape& shape);
// How many CTAs can take heads at a time, for each of which they wait there.
std::int64_t head_ctas(const AttentionSpec& spec, const AttentionShape& shape, int multiprocessors);
// Whether they do.
bool takes_heads(const AttentionSpec& spec, const AttentionShape& shape, const Target& target);

// Whether a call better runs by clusters, as far as its mask, its shape and the order of additions
// go: it is long enough, and there are key tiles enough. Of each call, in little time.
bool suits_clusters(const AttentionSpec& spec, const AttentionShape& shape, int multiprocessors);
// Whether it does.
bool takes_clusters(const AttentionSpec& spec, const AttentionShape& shape, const Target& target);

runtime::StatusOr<SplitBackwardTiles> split_backward_tiles(const AttentionSpec& spec,
                                                           const AttentionShape& shape,
                                                           const Target& target);

// Dynamic shared memory and threads of the kernel built from these tiles (sm90/forward.cuh).
int forward_shared_bytes(const ForwardTiles& tiles, int head_dim);
int forward_threads(const ForwardTiles& tiles);
// Whether sm90/wide_key_gradient.cuh is the kernel of dk and dv, or sm90/key_gradient.cuh.
inline bool is_wide(const SplitBackwardTiles& tiles) { return tiles.tile_k == 64; }
// Of the main and the postprocess kernel.
int backward_shared_bytes(const BackwardTiles& tiles, int head_dim);
int backward_postprocess_shared_bytes(const BackwardTiles& tiles, int head_dim);
// Rows of out and dout that a service warp of the main kernel prepares at a time: 4 KB of both.
int prepared_rows(int head_dim);
constexpr int kBackwardThreads = 384;
constexpr int kHeadBackwardThreads = 512;  // a warpgroup more, which adds dq up
constexpr int kBackwardPostprocessThreads = 256;

std::string describe(const ForwardTiles& tiles);
std::string describe(const BackwardTiles& tiles);
// Shared memory and threads of the kernel of dq; shared memory of that of dk and dv, and the larger
// of both.
int query_gradient_shared_bytes(const SplitBackwardTiles& tiles, int head_dim);
int query_gradient_threads(const SplitBackwardTiles& tiles);
int key_gradient_shared_bytes(const SplitBackwardTiles& tiles, int head_dim);
int split_backward_shared_bytes(const SplitBackwardTiles& tiles, int head_dim);
std::string describe(const SplitBackwardTiles& tiles);
runtime::StatusOr<ClusterBackwardTiles> cluster_backward_tiles(const AttentionSpec& spec,
                                                               const AttentionShape& shape,
                                                               const Target& target);
int cluster_backward_shared_bytes(const ClusterBackwardTiles& tiles, int head_dim);
int cluster_postprocess_shared_bytes(const ClusterBackwardTiles& tiles, int head_dim);
std::string describe(const ClusterBackwardTiles& tiles);
int head_backward_shared_bytes(const HeadBackwardTiles& tiles, int head_dim);
std::string describe(const HeadBackwardTiles& tiles);

}  // namespace jax_flash_attn::launchers::sm90
