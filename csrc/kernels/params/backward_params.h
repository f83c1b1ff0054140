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
  int* spoilt;      // (batch, heads): whether a key head's dk and dv need containing; at the first
                    // query head of its group
  int* turns;       // (batch, heads, padded_rows / kSmallestQueryTile); null unless deterministic
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

// The same for kernels whose CTAs deal tiles out among themselves.
struct Sm90DealtBackwardParams : Sm90BackwardParams {
  DealtTiles tiles;
};

}  // namespace jfa
