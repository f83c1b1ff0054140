// Launches the forward kernel.
#pragma once

#include <params/forward_params.h>

#include "launchers/attention_spec.h"
#include "runtime/driver_api.h"
#include "runtime/status.h"

namespace jax_flash_attn::launchers {

struct ForwardCall {
  AttentionSpec spec;
  AttentionShape shape;
  jfa::TensorView q, k, v, out;
  jfa::HeadValues slopes, dropout_keys;
  float* lse;
};

// Compiles and loads the kernel that `call` needs on the current device, or finds it there. Reads
// only the spec and the shape.
runtime::Status prepare_forward(const ForwardCall& call);

// Enqueues the kernel: no allocation, no synchronisation and, after prepare_forward, no load.
runtime::Status run_forward(const ForwardCall& call, runtime::CUstream stream);

}  // namespace jax_flash_attn::launchers
