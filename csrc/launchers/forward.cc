#include "launchers/forward.h"

#include <algorithm>

#include "launchers/attention_params.h"
#include "launchers/dealt_tiles.h"
#include "launchers/plan_table.h"
#include "launchers/specialization.h"
#include "launchers/tensor_maps.h"
#include "runtime/device.h"

namespace jax_flash_attn::launchers {
namespace {

using runtime::Status;
using runtime::StatusOr;

struct ForwardPlan {
  ForwardSpecialization specialization;
  const runtime::Kernel* kernel;
  int multiprocessors;
};

// Leaked on purpose: other threads may still launch while the process ends.
PlanTable<ForwardPlan>& plans() {
  static auto* const table = new PlanTable<ForwardPlan>;
  return *table;
}

StatusOr<ForwardPlan> make_plan(const ForwardCall& call) {
  JFA_ASSIGN_OR_RETURN(const CurrentDevice device, current_target());
  JFA_ASSIGN_OR_RETURN(
      ForwardSpecialization specialization,
      specialize_forward(call.spec, call.shape, device.target, forward_override()));
  JFA_ASSIGN_OR_RETURN(const runtime::Kernel* kernel, load(specialization.main, device.ordinal));
  JFA_ASSIGN_OR_RETURN(const runtime::DeviceInfo* info, runtime::device_info(device.ordinal));
  return ForwardPlan{std::move(specialization), kernel, info->multiprocessors};
}

Status run_sm90(const ForwardCall& call, const ForwardPlan& plan, const jfa::ForwardParams& forward,
                runtime::CUstream stream) {
  const AttentionShape& shape = call.shape;
  const ForwardSpecialization& specialization = plan.specialization;
  const std::int64_t query_tiles = ceil_div(shape.seqlen_q, specialization.tile_q);
  const std::int64_t heads = shape.batch * shape.heads;
  if (query_tiles * heads == 0) return Status();

  jfa::Sm90ForwardParams params{};
  params.forward = forward;
  JFA_RETURN_IF_ERROR(fill_tensor_map(params.q, call.q, shape.seqlen_q, shape.heads, shape.head_dim,
                                      specialization.tile_q));
  JFA_RETURN_IF_ERROR(fill_tensor_map(params.k, call.k, shape.seqlen_k, shape.heads_k,
                                      shape.head_dim, specialization.tile_k));
  JFA_RETURN_IF_ERROR(fill_tensor_map(params.v, call.v, shape.seqlen_k, shape.heads_k,
                                      shape.head_dim, specialization.tile_k));
  params.tiles = deal_query_tiles(shape, specialization.tile_q);
  return launch(*plan.kernel, specialization.main,
                std::min<std::int64_t>(plan.multiprocessors, query_tiles * heads), stream, &params);
}

}  // namespace

Status prepare_forward(const ForwardCall& call) {
  JFA_RETURN_IF_ERROR(check_sizes(call.shape));
  JFA_ASSIGN_OR_RETURN(const int device, runtime::current_device());
  return plans()
      .get(plan_key(call.spec, call.shape, device), [&] { return make_plan(call); })
      .status();
}

Status run_forward(const ForwardCall& call, runtime::CUstream stream) {
  JFA_ASSIGN_OR_RETURN(const int device, runtime::current_device());
  const PlanKey key = plan_key(call.spec, call.shape, device);
  const ForwardPlan* plan = plans().find(key);
  if (plan == nullptr) {
    JFA_RETURN_IF_ERROR(check_not_capturing(stream));
    JFA_RETURN_IF_ERROR(check_sizes(call.shape));
    JFA_ASSIGN_OR_RETURN(plan, plans().get(key, [&] { return make_plan(call); }));
  }
  jfa::ForwardParams params{};
  params.attention = attention_params(call);
  params.out = call.out;
  params.lse = call.lse;
  if (plan->specialization.family == Family::kSm90) return run_sm90(call, *plan, params, stream);
  const std::int64_t tiles = ceil_div(call.shape.seqlen_q, plan->specialization.tile_q);
  return launch(*plan->kernel, plan->specialization.main,
                tiles * call.shape.heads * call.shape.batch, stream, &params);
}

}  // namespace jax_flash_attn::launchers
