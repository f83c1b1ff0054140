// What the forward and the backward kernel both need to know about a call at run time. Everything
// that changes the code of a kernel is a constant of its Config instead.
#pragma once

#include <params/tensor_view.h>

namespace jfa {

struct AttentionParams {
  TensorView q;
  TensorView k;
  TensorView v;
  HeadValues slopes;        // float: ALiBi slope
  HeadValues dropout_keys;  // two unsigned words: Philox key
  int batch;
  int heads;
  int heads_k;
  int seqlen_q;
  int seqlen_k;
  int diagonal;     // key index that query 0 is aligned with, for masks
  int window_left;  // of masks; longer than any sequence where a side has no limit
  int window_right;
  float softmax_scale;
  float softcap;
  unsigned int dropout_threshold;  // a probability is kept when its random word is at least this
  float dropout_scale;             // 1 / (1 - dropout_p)
};

// The tiles that persistent CTAs deal out among themselves (attention/tile_order.cuh).
struct DealtTiles {
  int of_head;        // of one (batch, head) pair
  int section_heads;  // pairs whose tiles are sorted by length together
};

}  // namespace jfa
