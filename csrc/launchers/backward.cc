#include "launchers/backward.h"

#include <algorithm>
#include <cmath>
#include <future>
#include <string>
#include <vector>

#include "launchers/attention_params.h"
#include "launchers/dealt_tiles.h"
#include "launchers/plan_table.h"
#include "launchers/sm90_tiles.h"
#include "launchers/specialization.h"
#include "launchers/tensor_maps.h"
#include "runtime/device.h"

namespace jax_flash_attn::launchers {
namespace {

using runtime::Status;
using runtime::StatusOr;

struct BackwardPlan {
  BackwardSpecialization specialization;
  const runtime::Kernel* first;  // null where there is none
  const runtime::Kernel* main;
  const runtime::Kernel* postprocess;  // likewise
  int multiprocessors;
  int clusters;  // of the main kernel that run at one time; of kSm90Cluster alone
};

// Leaked on purpose: other threads may still launch while the process ends.
PlanTable<BackwardPlan>& plans() {
  static auto* const table = new PlanTable<BackwardPlan>;
  return *table;
}

// On top of what the tables depend on: whether there are heads enough, or key tiles.
StatusOr<PlanKey> key_of(const BackwardCall& call, int device) {
  JFA_ASSIGN_OR_RETURN(const runtime::DeviceInfo* info, runtime::device_info(device));
  PlanKey key = plan_key(call.spec, call.shape, device);
  for (const bool suits : {sm90::suits_heads(call.spec, call.shape, info->multiprocessors),
                           sm90::suits_one_round(call.spec, call.shape, info->multiprocessors),
                           sm90::suits_clusters(call.spec, call.shape, info->multiprocessors)})
    key.values.back() = 2 * key.values.back() + (suits ? 1 : 0);
  return key;
}

StatusOr<BackwardPlan> make_plan(const BackwardCall& call) {
  JFA_ASSIGN_OR_RETURN(const CurrentDevice device, current_target());
  JFA_ASSIGN_OR_RETURN(
      BackwardSpecialization specialization,
      specialize_backward(call.spec, call.shape, device.target, backward_override()));
  // Compiling needs no context, so the kernels compile side by side; failures come back through
  // load().
  const auto compile = [](const KernelSpecialization& kernel) {
    return std::async(std::launch::async,
                      [&kernel] { (void)runtime::kernel_cache().cubin(kernel.request); });
  };
  const std::vector<KernelSpecialization> kernels = specialization.kernels();
  std::vector<std::future<void>> compiled;
  for (const KernelSpecialization& kernel : kernels) compiled.push_back(compile(kernel));
  JFA_ASSIGN_OR_RETURN(const runtime::Kernel* main, load(specialization.main, device.ordinal));
  const runtime::Kernel* first = nullptr;
  if (specialization.first) {
    JFA_ASSIGN_OR_RETURN(first, load(*specialization.first, device.ordinal));
  }
  const runtime::Kernel* postprocess = nullptr;
  if (specialization.postprocess) {
    JFA_ASSIGN_OR_RETURN(postprocess, load(*specialization.postprocess, device.ordinal));
  }
  JFA_ASSIGN_OR_RETURN(const runtime::DeviceInfo* info, runtime::device_info(device.ordinal));
  int clusters = 0;
  if (specialization.family == Family::kSm90Cluster) {
    JFA_ASSIGN_OR_RETURN(
        clusters, runtime::max_active_clusters(
                      *main, launch_shape(specialization.main, specialization.main.cluster_ctas)));
    if (clusters == 0)
      return Status::failed_precondition(
          "This device runs no clusters of " + std::to_string(specialization.main.cluster_ctas) +
          " CTAs, which the backward of the sm90cluster family is made of.");
  }
  return BackwardPlan{std::move(specialization), first,   main, postprocess,
                      info->multiprocessors,     clusters};
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
  params.key_parts = call.key_parts;
  params.lse_batches = call.lse_batches;
  params.dlse_batches = call.dlse_batches;
  params.padded_rows = static_cast<int>(round_up(call.shape.seqlen_q, jfa::kWorkspaceRowMultiple));
  params.padded_columns =
      static_cast<int>(round_up(call.shape.head_dim, jfa::kWorkspaceColumnMultiple));
  params.dq_accum = call.dq_accum;
  params.lse_log2 = call.statistics;
  params.delta = call.statistics + call.shape.batch * call.shape.heads * params.padded_rows;
  const std::int64_t heads = call.shape.batch * call.shape.heads;
  params.spoilt = call.head_states;
  params.dq_spoilt = params.spoilt + heads;
  params.prepared = params.dq_spoilt + heads;
  params.added = params.prepared + heads;
  params.taken = params.added + heads;
  params.turns = call.turns;
  return params;
}

// With boxes of these tiles.
Status fill_sm90_params(jfa::Sm90BackwardParams& params, const BackwardCall& call, int tile_q,
                        int tile_k) {
  const AttentionShape& shape = call.shape;
  const auto fill = [&](jfa::TensorMap& map, const jfa::TensorView& view, std::int64_t seqlen,
                        std::int64_t heads, int rows) {
    return fill_tensor_map(map, view, seqlen, heads, shape.head_dim, rows);
  };
  JFA_RETURN_IF_ERROR(fill(params.q, call.q, shape.seqlen_q, shape.heads, tile_q));
  JFA_RETURN_IF_ERROR(fill(params.dout, call.dout, shape.seqlen_q, shape.heads, tile_q));
  const std::int64_t key_heads = shape.heads_k / call.key_parts;
  JFA_RETURN_IF_ERROR(fill(params.k, call.k, shape.seqlen_k, key_heads, tile_k));
  return fill(params.v, call.v, shape.seqlen_k, key_heads, tile_k);
}

// How many keys a query sees, over queries spread evenly.
std::int64_t mean_visible_keys(const jfa::AttentionParams& params) {
  constexpr std::int64_t kSamples = 16;
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < kSamples; ++i) {
    const std::int64_t key = (2 * i + 1) * params.seqlen_q / (2 * kSamples) + params.diagonal;
    const std::int64_t first = std::max<std::int64_t>(0, key - params.window_left);
    const std::int64_t last =
        std::min<std::int64_t>(params.seqlen_k - 1, key + params.window_right);
    sum += std::max<std::int64_t>(0, last - first + 1);
  }
  return sum / kSamples;
}

// Where queries see fewer keys than this, a CTA's products are done before its idle warps are.
constexpr std::int64_t kServedKeys = 384;
// From as many keys and steps of as many queries on, and in calls of as many rounds, idle warps
// keep up with products that are less far apart. Tuned at sequences of 16,384 tokens in all.
constexpr std::int64_t kSteadyKeys = 1024;
constexpr std::int64_t kSteadyQueries = 1024;
constexpr std::int64_t kSteadyRounds = 8;
// How many rounds of CTAs behind a group its rows are rounded.
constexpr double kRoundsBehind = 2.0;

// The main kernel, whose idle warps prepare and round the rows of most groups of heads, between
// two kernels for the rows of the others.
Status run_fused(const BackwardCall& call, const BackwardPlan& plan,
                 const jfa::BackwardParams& backward, runtime::CUstream stream) {
  const AttentionShape& shape = call.shape;
  const BackwardSpecialization& specialization = plan.specialization;
  if (shape.batch == 0) return Status();  // there is nothing that a tensor map could describe
  const std::int64_t groups = shape.batch * shape.heads_k;
  const std::int64_t group_heads = shape.group_heads();
  const std::int64_t group_tiles = ceil_div(shape.seqlen_k, specialization.tile_k);
  // Groups that the CTAs of so many rounds of all multiprocessors make up.
  const auto groups_of = [&](double rounds) {
    const auto ctas = static_cast<std::int64_t>(rounds * plan.multiprocessors);
    return std::min(groups, 1 + ceil_div(ctas, std::max<std::int64_t>(group_tiles, 1)));
  };
  const std::int64_t visible_keys = mean_visible_keys(backward.attention);
  // So few that the main kernel would round none, and CTAs of the first rounds wait for rows that
  // others only prepare in them: 10 to 20% under a causal mask (docs/tuning.md).
  const bool few_groups = call.spec.windowed() && groups_of(kRoundsBehind) == groups;
  // A group that shares its query head with others has no rows of its own.
  const bool serves = specialization.prepared_rows > 0 && shape.seqlen_q > 0 && !few_groups &&
                      visible_keys >= kServedKeys && !shape.splits_query_heads();
  // With such leads a CTA finds its rows prepared, and a group finished or nearly so. The shorter
  // they are, the more of the rows is still in L2: key tiles that take equally long, and long, need
  // less of them, and CTAs of the first round, which then wait for some, are few (docs/tuning.md).
  const bool steady = !call.spec.windowed() && visible_keys >= kSteadyKeys &&
                      group_heads * shape.seqlen_q >= kSteadyQueries &&
                      group_tiles * groups >= kSteadyRounds * plan.multiprocessors;
  const std::int64_t prepares_ahead = serves ? groups_of(steady ? 0.7 : 1.5) : groups;
  const std::int64_t rounds_behind = serves ? groups_of(steady ? 1.2 : kRoundsBehind) : groups;
  jfa::Sm90FusedBackwardParams params{};
  params.backward = backward;
  params.group_heads = static_cast<int>(group_heads);
  params.prepares_ahead = static_cast<int>(prepares_ahead);
  params.rounds_behind = static_cast<int>(rounds_behind);
  // No more than either, or CTAs would wait for some with larger indices; all, where nobody waits.
  params.last_groups = static_cast<int>(
      few_groups ? groups : std::min({groups_of(1.5), prepares_ahead, rounds_behind}));
  // Between a key tile's addition to a query tile and the next one's pass about 0.7 of a step.
  constexpr double kStepsBetweenAdditions = 0.7;
  const std::int64_t steps = group_heads * ceil_div(shape.seqlen_q, specialization.tile_q);
  params.alternating_groups = static_cast<int>(std::min<double>(
      groups,
      std::ceil(kStepsBetweenAdditions * plan.multiprocessors / std::max<std::int64_t>(steps, 1))));
  if (group_tiles > 0)
    JFA_RETURN_IF_ERROR(
        fill_sm90_params(params, call, specialization.tile_q, specialization.tile_k));
  if (serves) {
    const auto fill = [&](jfa::TensorMap& map, const jfa::TensorView& view) {
      return fill_tensor_map(map, view, shape.seqlen_q, shape.heads, shape.head_dim,
                             specialization.prepared_rows);
    };
    JFA_RETURN_IF_ERROR(fill(params.out_rows, call.out));
    JFA_RETURN_IF_ERROR(fill(params.dout_rows, call.dout));
  }

  // Query heads of so many groups, of which some may share one.
  const auto heads_of = [&](std::int64_t of_groups) {
    return std::min(of_groups * group_heads, shape.batch * shape.heads);
  };
  const std::int64_t row_blocks = backward.padded_rows / jfa::kWorkspaceRowMultiple;
  const std::int64_t first_ctas = row_blocks * heads_of(prepares_ahead);
  JFA_RETURN_IF_ERROR(launch(*plan.first, *specialization.first, first_ctas, stream, &backward));
  // CTAs stay, and take one key tile after the other. Without queries nobody has cleared what they
  // take tiles by, and there is little to do.
  const std::int64_t key_tiles = group_tiles * groups;
  const std::int64_t main_ctas =
      first_ctas > 0 ? std::min<std::int64_t>(key_tiles, plan.multiprocessors) : key_tiles;
  JFA_RETURN_IF_ERROR(
      launch(*plan.main, specialization.main, main_ctas, stream, &params, first_ctas > 0));
  const std::int64_t query_tiles = ceil_div(shape.seqlen_q, specialization.tile_q);
  return launch(*plan.postprocess, *specialization.postprocess,
                query_tiles * heads_of(rounds_behind), stream, &backward,
                first_ctas + main_ctas > 0);
}

// dq by itself, which also leaves the statistics for dk and dv; then these.
Status run_split(const BackwardCall& call, const BackwardPlan& plan,
                 const jfa::BackwardParams& backward, runtime::CUstream stream) {
  const AttentionShape& shape = call.shape;
  const BackwardSpecialization& specialization = plan.specialization;
  const std::int64_t multiprocessors = plan.multiprocessors;
  if (shape.batch == 0) return Status();  // there is nothing that a tensor map could describe
  jfa::Sm90DealtBackwardParams dq{};
  dq.backward = backward;
  AttentionShape of_keys = shape;  // as k and v have heads
  of_keys.heads_k /= call.key_parts;
  dq.tiles = deal_query_tiles(of_keys, specialization.dq_tile_q);
  JFA_RETURN_IF_ERROR(
      fill_sm90_params(dq, call, specialization.dq_tile_q, specialization.dq_tile_k));
  const std::int64_t query_tiles = dq.tiles.of_head * shape.batch * shape.heads;
  const std::int64_t dq_ctas = std::min(multiprocessors, query_tiles);
  // In the states of heads that only the fused form has, three for each. Above head dim 128 dk and
  // dv are no faster for it, and slower at 2k (docs/tuning.md).
  const bool starts_early = shape.head_dim <= 128 && dq_ctas <= 3 * shape.batch * shape.heads;
  dq.statistics_done = starts_early ? backward.prepared : nullptr;
  dq.statistics_ctas = static_cast<int>(dq_ctas);
  JFA_RETURN_IF_ERROR(launch(*plan.first, *specialization.first, dq_ctas, stream, &dq));

  jfa::Sm90DealtBackwardParams dk_dv{};
  dk_dv.backward = backward;
  dk_dv.tiles = deal_key_tiles(shape, specialization.tile_k);
  dk_dv.statistics_done = dq.statistics_done;
  dk_dv.statistics_ctas = dq.statistics_ctas;
  JFA_RETURN_IF_ERROR(fill_sm90_params(dk_dv, call, specialization.tile_q, specialization.tile_k));
  const std::int64_t key_tiles = dk_dv.tiles.of_head * shape.batch * shape.heads_k;
  return launch(*plan.main, specialization.main, std::min(multiprocessors, key_tiles), stream,
                &dk_dv, query_tiles > 0);
}

// The rows of all heads, then everything else by clusters, and the rows again.
Status run_cluster(const BackwardCall& call, const BackwardPlan& plan,
                   const jfa::BackwardParams& backward, runtime::CUstream stream) {
  const AttentionShape& shape = call.shape;
  const BackwardSpecialization& specialization = plan.specialization;
  if (shape.batch == 0) return Status();  // there is nothing that a tensor map could describe
  const std::int64_t query_heads = shape.batch * shape.heads;
  const std::int64_t first_ctas = backward.padded_rows / jfa::kWorkspaceRowMultiple * query_heads;
  JFA_RETURN_IF_ERROR(launch(*plan.first, *specialization.first, first_ctas, stream, &backward));
  jfa::Sm90DealtBackwardParams params{};
  params.backward = backward;
  params.tiles = deal_key_tiles(shape, (sm90::kClusterCtas - 1) * specialization.tile_k);
  if (params.tiles.of_head > 0)
    JFA_RETURN_IF_ERROR(
        fill_sm90_params(params, call, specialization.tile_q, specialization.tile_k));
  const std::int64_t groups = params.tiles.of_head * shape.batch * shape.heads_k;
  const std::int64_t clusters = std::min<std::int64_t>(groups, plan.clusters);
  JFA_RETURN_IF_ERROR(launch(*plan.main, specialization.main, clusters * sm90::kClusterCtas, stream,
                             &params, first_ctas > 0));
  return launch(*plan.postprocess, *specialization.postprocess,
                ceil_div(shape.seqlen_q, specialization.tile_q) * query_heads, stream, &backward,
                first_ctas + clusters > 0);
}

// Of every call: where the family is forced, one plan serves calls with such parts and others. In
// order, key heads that share a query head would wait for each other: a query tile may be in one's
// part for one key tile and in another's for the next.
Status check_parts(const BackwardCall& call, Family family) {
  if (!call.shape.splits_query_heads()) return Status();
  const bool in_order = call.spec.deterministic && family != Family::kSm90Split;
  if (family != Family::kSm90Head && call.shape.head_dim <= jfa::kPartHeadDim && !in_order)
    return Status();
  return Status::unimplemented(
      "Key heads with a part of a query head each are for head dims up to " +
      std::to_string(jfa::kPartHeadDim) +
      ", other families than sm90head, and with deterministic=True for sm90split alone: programs "
      "that are to run by another family must be compiled while it is forced.");
}

// Everything at once, a head at a time.
Status run_head(const BackwardCall& call, const BackwardPlan& plan,
                const jfa::BackwardParams& backward, runtime::CUstream stream) {
  const AttentionShape& shape = call.shape;
  const BackwardSpecialization& specialization = plan.specialization;
  if (shape.batch == 0) return Status();  // there is nothing that a tensor map could describe
  // Of every call: where the family is forced, one plan serves heads that fit and others.
  JFA_RETURN_IF_ERROR(
      sm90::check_head_fits(specialization.head_tiles, specialization.tile_q, shape));
  jfa::Sm90HeadBackwardParams params{};
  params.backward = backward;
  // Each consumer's are fetched by themselves.
  const int key_rows = specialization.tile_k / sm90::kKeyConsumers;
  JFA_RETURN_IF_ERROR(fill_sm90_params(params, call, specialization.tile_q, key_rows));
  const auto fill = [&](jfa::TensorMap& map, const jfa::TensorView& view) {
    return fill_tensor_map(map, view, shape.seqlen_k, shape.heads_k, shape.head_dim, key_rows);
  };
  JFA_RETURN_IF_ERROR(fill(params.dk, call.dk));
  JFA_RETURN_IF_ERROR(fill(params.dv, call.dv));
  params.partial_tiles = static_cast<int>(sm90::head_partial_tiles(call.spec, shape));
  const std::int64_t ctas = sm90::head_ctas(call.spec, shape, plan.multiprocessors);
  if (ctas == 0)
    return Status::unimplemented(
        "dk and dv of a key head of the sm90head family wait in the workspace, which is too small "
        "for them.");
  return launch(*plan.main, specialization.main, ctas, stream, &params);
}

}  // namespace

Status prepare_backward(const BackwardCall& call) {
  JFA_RETURN_IF_ERROR(check_sizes(call.shape));
  JFA_ASSIGN_OR_RETURN(const int device, runtime::current_device());
  JFA_ASSIGN_OR_RETURN(const PlanKey key, key_of(call, device));
  return plans().get(key, [&] { return make_plan(call); }).status();
}

Status run_backward(const BackwardCall& call, runtime::CUstream stream) {
  JFA_ASSIGN_OR_RETURN(const int device, runtime::current_device());
  JFA_ASSIGN_OR_RETURN(const PlanKey key, key_of(call, device));
  const BackwardPlan* plan = plans().find(key);
  if (plan == nullptr) {
    JFA_RETURN_IF_ERROR(check_not_capturing(stream));
    JFA_RETURN_IF_ERROR(check_sizes(call.shape));
    JFA_ASSIGN_OR_RETURN(plan, plans().get(key, [&] { return make_plan(call); }));
  }
  const BackwardSpecialization& specialization = plan->specialization;
  JFA_RETURN_IF_ERROR(check_parts(call, specialization.family));
  const jfa::BackwardParams params = backward_params(call);
  const std::int64_t query_heads = call.shape.batch * call.shape.heads;
  if (specialization.family == Family::kSm90Split) return run_split(call, *plan, params, stream);
  if (specialization.family == Family::kSm90Head) return run_head(call, *plan, params, stream);
  if (specialization.family == Family::kSm90Cluster)
    return run_cluster(call, *plan, params, stream);
  if (specialization.family == Family::kSm90) return run_fused(call, *plan, params, stream);
  JFA_RETURN_IF_ERROR(launch(*plan->first, *specialization.first,
                             params.padded_rows / jfa::kWorkspaceRowMultiple * query_heads, stream,
                             &params));
  const std::int64_t key_tiles =
      ceil_div(call.shape.seqlen_k, specialization.tile_k) * call.shape.batch * call.shape.heads_k;
  JFA_RETURN_IF_ERROR(launch(*plan->main, specialization.main, key_tiles, stream, &params));
  return launch(*plan->postprocess, *specialization.postprocess,
                ceil_div(call.shape.seqlen_q, specialization.tile_q) * query_heads, stream,
                &params);
}

}  // namespace jax_flash_attn::launchers
