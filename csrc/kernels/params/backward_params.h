// Arguments of the backward kernels: preprocess, main and postprocess, or those of dq and of dk and
// dv.
#pragma once

#include <params/attention_params.h>
#include <params/tensor_map.h>

namespace jfa {

// The workspace is padded to whole query tiles of the largest size, so that its shape does not
// depend on the tiles that the device ends up with.
constexpr int kWorkspaceRowMultiple = 128;
constexpr int kWorkspaceColumnMultiple = 64;
// The smallest query tile of any backward kernel: the turn counters are spaced for it.
constexpr int kSmallestQueryTile = 16;
// Numbers that the CTAs of a backward keep of each head: BackwardParams' spoilt and what follows
// it.
constexpr int kHeadStates = 5;

// The widest heads of which a key head may have a part of the queries (attention/query_group.cuh).
constexpr int kPartHeadDim = 128;

struct BackwardParams {
  AttentionParams attention;
  TensorView out;
  TensorView dout;
  TensorView dq;
  TensorView dk;
  TensorView dv;
  const float* lse;   // (batch, heads, seqlen_q), natural log
  const float* dlse;  // cotangent of lse, or null
  // Workspace, rows padded to padded_rows:
  float* dq_accum;  // (batch, heads, padded_rows * padded_columns), layout private to the kernels
  float* lse_log2;  // (batch, heads, padded_rows): lse * log2(e); +inf where a row sees no key
  float* delta;     // (batch, heads, padded_rows): rowsum(dout * out) - dlse
  // (kHeadStates, batch, heads), where those of a key head are at the first query head of its
  // group:
  int* spoilt;     // whether the key head's dk and dv need containing
  int* dq_spoilt;  // whether dq of the query head does, where the main kernel has rounded it
  int* prepared;   // of key tiles' service warps: those that have prepared their share of the group
  int* added;      // key tiles whose additions to dq of the group are all there
  int* taken;      // of the first head alone: key tiles that CTAs have taken
  int* turns;      // (batch, heads, padded_rows / kSmallestQueryTile); null unless deterministic
  // Of attention.heads_k, how many in a row share a head of k and v, each with dk and dv for some
  // of its query heads or some queries of one (attention/query_group.cuh,
  // jax_flash_attn/_key_parts.py).
  int key_parts;
  int lse_batches;  // lse and dlse of batch b are those of b % lse_batches
  int dlse_batches;
  int padded_rows;
  int padded_columns;
};

// What the sm90 kernel is given on top: tensors for the copy engine.
struct Sm90BackwardParams {
  TensorMap q;  // boxes of 64 columns x kTileQ rows
  TensorMap dout;
  TensorMap k;  // 64 columns x kTileK rows
  TensorMap v;
  BackwardParams backward;
};

// The same for the fused kernel, whose idle warps serve the rows of other groups of heads
// (sm90/row_service.cuh): of the group `prepares_ahead` groups on, and of the one `rounds_behind`
// groups back. What they leave, the first and the last groups, is for the kernels before and
// behind.
struct Sm90FusedBackwardParams : Sm90BackwardParams {
  TensorMap out_rows;  // boxes of 64 columns x Config::kPreparedRows rows
  TensorMap dout_rows;
  int group_heads;  // query heads of a group
  int prepares_ahead;
  int rounds_behind;
  int last_groups;         // that come in another order (sm90/fused_place.cuh)
  int alternating_groups;  // deterministic alone: of how many groups key tiles alternate
};

// The same for kernels whose CTAs take whole heads: boxes of k, dk and dv have half of kTileK rows;
// v is read by threads.
struct Sm90HeadBackwardParams : Sm90BackwardParams {
  TensorMap dk;
  TensorMap dv;
  int partial_tiles;  // key tiles, from the first on, whose dk and dv wait in dq_accum between
                      // passes
};

// The same for kernels whose CTAs deal tiles out among themselves.
struct Sm90DealtBackwardParams : Sm90BackwardParams {
  DealtTiles tiles;
  // Of each of the CTAs that compute dq: how many of its warps have worked out all their
  // statistics, for which dk and dv then wait, not for dq. Null where they wait for the kernel.
  int* statistics_done;
  int statistics_ctas;
};

}  // namespace jfa
