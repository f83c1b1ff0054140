// Arguments of the forward kernel.
#pragma once

#include <params/attention_params.h>

namespace jfa {

struct ForwardParams {
  AttentionParams attention;
  TensorView out;
  float* lse;  // (batch, heads, seqlen_q), natural log
};

}  // namespace jfa
