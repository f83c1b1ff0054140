// Launches the kernels of the backward.
#pragma once

#include <params/backward_params.h>

#include "launchers/attention_spec.h"
#include "runtime/driver_api.h"
#include "runtime/status.h"

namespace jax_flash_attn::launchers {

struct BackwardCall {
  AttentionSpec spec;
  AttentionShape shape;
  jfa::TensorView q, k, v, out, dout, dq, dk, dv;
  jfa::HeadValues slopes, dropout_keys;
  const float* lse;
  const float* dlse;  // null: lse has no cotangent
  int key_parts;      // of shape.heads_k, the heads of dk and dv, so many share a head of k and v
  int lse_batches;
  int dlse_batches;
  // Workspace, see jax_flash_attn/_shapes.py.
  float* dq_accum;
  float* statistics;
  int* head_states;
  int* turns;  // null unless deterministic
};

// As prepare_forward and run_forward.
runtime::Status prepare_backward(const BackwardCall& call);
runtime::Status run_backward(const BackwardCall& call, runtime::CUstream stream);

}  // namespace jax_flash_attn::launchers
