#include "launchers/backward.h"

#include <future>

#include "launchers/attention_params.h"
#include "launchers/plan_table.h"
#include "launchers/specialization.h"
#include "launchers/tensor_maps.h"
#include "runtime/device.h"

namespace jax_flash_attn::launchers {
namespace {

using runtime::Status;
using runtime::StatusOr;

struct BackwardPlan {
  BackwardSpecialization specialization;
  const runtime::Kernel* preprocess;
  const runtime::Kernel* main;
  const runtime::Kernel* postprocess;
};

// Leaked on purpose: other threads may still launch while the process ends.
PlanTable<BackwardPlan>& plans() {
  static auto* const table = new PlanTable<BackwardPlan>;
  return *table;
}

StatusOr<BackwardPlan> make_plan(const BackwardCall& call) {
  JFA_ASSIGN_OR_RETURN(const CurrentDevice device, current_target());
  JFA_ASSIGN_OR_RETURN(
      BackwardSpecialization specialization,
      specialize_backward(call.spec, call.shape, device.target, backward_override()));
  // Compiling needs no context, so the two small kernels compile beside the large one; their
  // failures come back through load().
  const auto compile = [](const KernelSpecialization* kernel) {
    return std::async(std::launch::async,
                      [kernel] { (void)runtime::kernel_cache().cubin(kernel->request); });
  };
  const auto preprocess_compiled = compile(&specialization.preprocess);
  const auto postprocess_compiled = compile(&specialization.postprocess);
  JFA_ASSIGN_OR_RETURN(const runtime::Kernel* main, load(specialization.main, device.ordinal));
  JFA_ASSIGN_OR_RETURN(const runtime::Kernel* preprocess,
                       load(specialization.preprocess, device.ordinal));
  JFA_ASSIGN_OR_RETURN(const runtime::Kernel* postprocess,
                       load(specialization.postprocess, device.ordinal));
  preprocess_compiled.wait();
  postprocess_compiled.wait();
  return BackwardPlan{std::move(specialization), preprocess, main, postprocess};
}

jfa::BackwardParams backward_params(const BackwardCall& call) {
  jfa::BackwardParams params{};
  params.attention = attention_params(call);
  params.out = call.out;
  params.dout = call.dout;
  params.dq = call.dq;
  params.dk = call.dk;
  params.dv = call.dv;
  params.lse = call.lse;
  params.dlse = call.dlse;
  params.lse_batches = call.lse_batches;
  params.dlse_batches = call.dlse_batches;
  const auto round_up = [](std::int64_t value, std::int64_t multiple) {
    return ceil_div(value, multiple) * multiple;
  };
  params.padded_rows = static_cast<int>(round_up(call.shape.seqlen_q, jfa::kWorkspaceRowMultiple));
  params.padded_columns =
      static_cast<int>(round_up(call.shape.head_dim, jfa::kWorkspaceColumnMultiple));
  params.dq_accum = call.dq_accum;
  params.lse_log2 = call.statistics;
  params.delta = call.statistics + call.shape.batch * call.shape.heads * params.padded_rows;
  params.spoilt = call.spoilt;
  params.turns = call.turns;
  return params;
}

StatusOr<jfa::Sm90BackwardParams> sm90_params(const BackwardCall& call,
                                              const BackwardSpecialization& specialization,
                                              const jfa::BackwardParams& backward) {
  const AttentionShape& shape = call.shape;
  jfa::Sm90BackwardParams params{};
  params.backward = backward;
  const auto fill = [&](jfa::TensorMap& map, const jfa::TensorView& view, std::int64_t seqlen,
                        std::int64_t heads, int rows) {
    return fill_tensor_map(map, view, seqlen, heads, shape.head_dim, rows);
  };
  JFA_RETURN_IF_ERROR(fill(params.q, call.q, shape.seqlen_q, shape.heads, specialization.tile_q));
  JFA_RETURN_IF_ERROR(
      fill(params.dout, call.dout, shape.seqlen_q, shape.heads, specialization.tile_q));
  JFA_RETURN_IF_ERROR(fill(params.k, call.k, shape.seqlen_k, shape.heads_k, specialization.tile_k));
  JFA_RETURN_IF_ERROR(fill(params.v, call.v, shape.seqlen_k, shape.heads_k, specialization.tile_k));
  return params;
}

}  // namespace

Status prepare_backward(const BackwardCall& call) {
  JFA_RETURN_IF_ERROR(check_sizes(call.shape));
  JFA_ASSIGN_OR_RETURN(const int device, runtime::current_device());
  return plans()
      .get(plan_key(call.spec, call.shape, device), [&] { return make_plan(call); })
      .status();
}

Status run_backward(const BackwardCall& call, runtime::CUstream stream) {
  JFA_ASSIGN_OR_RETURN(const int device, runtime::current_device());
  const PlanKey key = plan_key(call.spec, call.shape, device);
  const BackwardPlan* plan = plans().find(key);
  if (plan == nullptr) {
    JFA_RETURN_IF_ERROR(check_not_capturing(stream));
    JFA_RETURN_IF_ERROR(check_sizes(call.shape));
    JFA_ASSIGN_OR_RETURN(plan, plans().get(key, [&] { return make_plan(call); }));
  }
  const BackwardSpecialization& specialization = plan->specialization;
  const jfa::BackwardParams params = backward_params(call);
  const std::int64_t query_heads = call.shape.batch * call.shape.heads;
  JFA_RETURN_IF_ERROR(launch(*plan->preprocess, specialization.preprocess,
                             params.padded_rows / jfa::kWorkspaceRowMultiple * query_heads, stream,
                             &params));
  const std::int64_t key_tiles =
      ceil_div(call.shape.seqlen_k, specialization.tile_k) * call.shape.batch * call.shape.heads_k;
  if (specialization.family == Family::kSm90 && key_tiles > 0) {
    JFA_ASSIGN_OR_RETURN(const jfa::Sm90BackwardParams sm90,
                         sm90_params(call, specialization, params));
    JFA_RETURN_IF_ERROR(launch(*plan->main, specialization.main, key_tiles, stream, &sm90));
  } else {
    JFA_RETURN_IF_ERROR(launch(*plan->main, specialization.main, key_tiles, stream, &params));
  }
  return launch(*plan->postprocess, specialization.postprocess,
                ceil_div(call.shape.seqlen_q, specialization.tile_q) * query_heads, stream,
                &params);
}

}  // namespace jax_flash_attn::launchers
