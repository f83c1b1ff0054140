// What the launchers of both passes share: kernel arguments from a call, checks, launches.
#pragma once

#include <params/attention_params.h>

#include "launchers/attention_spec.h"
#include "launchers/specialization.h"
#include "runtime/driver_api.h"
#include "runtime/kernel_cache.h"
#include "runtime/launch.h"
#include "runtime/status.h"

namespace jax_flash_attn::launchers {

// The run-time arguments common to both passes, from a ForwardCall or a BackwardCall.
template <typename Call>
jfa::AttentionParams attention_params(const Call& call);

// What the kernels' 32-bit indices can hold; 64-bit addresses are made from them.
runtime::Status check_sizes(const AttentionShape& shape);

// The target for the current device.
struct CurrentDevice {
  int ordinal;
  Target target;
};
runtime::StatusOr<CurrentDevice> current_target();

// Loads one kernel on the current device.
runtime::StatusOr<const runtime::Kernel*> load(const KernelSpecialization& kernel, int device);

// A plan that is missing when it is needed can be made on the spot, but not while a CUDA graph is
// recorded: loading a module would end the capture.
runtime::Status check_not_capturing(runtime::CUstream stream);

// How `ctas` CTAs of a kernel are launched, behind one of the same call or not.
runtime::LaunchShape launch_shape(const KernelSpecialization& specialization, std::int64_t ctas,
                                  bool behind_same_call = false);

// Launches `ctas` CTAs of a kernel, or nothing where there are none. A kernel that starts early
// does so only behind one of the same call: it may write what others in the stream still read.
runtime::Status launch(const runtime::Kernel& kernel, const KernelSpecialization& specialization,
                       std::int64_t ctas, runtime::CUstream stream, const void* params,
                       bool behind_same_call = false);

inline std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) {
  return (value + divisor - 1) / divisor;
}
inline std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

jfa::AttentionParams make_attention_params(const AttentionSpec& spec, const AttentionShape& shape);

template <typename Call>
jfa::AttentionParams attention_params(const Call& call) {
  jfa::AttentionParams params = make_attention_params(call.spec, call.shape);
  params.q = call.q;
  params.k = call.k;
  params.v = call.v;
  params.slopes = call.slopes;
  params.dropout_keys = call.dropout_keys;
  return params;
}

}  // namespace jax_flash_attn::launchers
