#include "launchers/forward.h"

#include "launchers/attention_params.h"
#include "launchers/plan_table.h"
#include "launchers/specialization.h"
#include "runtime/device.h"

namespace jax_flash_attn::launchers {
namespace {

using runtime::Status;
using runtime::StatusOr;

struct ForwardPlan {
  ForwardSpecialization specialization;
  const runtime::Kernel* kernel;
};

// Leaked on purpose: other threads may still launch while the process ends.
PlanTable<ForwardPlan>& plans() {
  static auto* const table = new PlanTable<ForwardPlan>;
  return *table;
}

StatusOr<ForwardPlan> make_plan(const ForwardCall& call) {
  JFA_ASSIGN_OR_RETURN(const CurrentDevice device, current_target());
  JFA_ASSIGN_OR_RETURN(ForwardSpecialization specialization,
                       specialize_forward(call.spec, call.shape, device.target));
  JFA_ASSIGN_OR_RETURN(const runtime::Kernel* kernel, load(specialization.main, device.ordinal));
  return ForwardPlan{std::move(specialization), kernel};
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
  const std::int64_t tiles = ceil_div(call.shape.seqlen_q, plan->specialization.tiles.tile_q);
  return launch(*plan->kernel, plan->specialization.main,
                tiles * call.shape.heads * call.shape.batch, stream, &params);
}

}  // namespace jax_flash_attn::launchers
