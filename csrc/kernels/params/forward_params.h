// Arguments of the forward kernels.
#pragma once

#include <params/attention_params.h>
#include <params/tensor_map.h>

namespace jfa {

struct ForwardParams {
  AttentionParams attention;
  TensorView out;
  float* lse;  // (batch, heads, seqlen_q), natural log
};

// What the sm90 kernel is given on top: the same tensors for the copy engine, and how its
// persistent CTAs share the query tiles out.
struct Sm90ForwardParams {
  TensorMap q;  // boxes of 64 columns x kTileQ rows
  TensorMap k;  // 64 columns x kTileK rows
  TensorMap v;
  ForwardParams forward;
  DealtTiles tiles;
};

}  // namespace jfa
