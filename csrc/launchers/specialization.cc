#include "launchers/specialization.h"

#include <charconv>

#include "launchers/sm80_tiles.h"
#include "launchers/sm90_tiles.h"

namespace jax_flash_attn::launchers {
namespace {

using runtime::Status;
using runtime::StatusOr;

constexpr int kOldestComputeCapability = 80;
constexpr int kPreprocessThreads = 256;  // portable/backward_preprocess.cuh
// wgmma and setmaxnreg are in the instruction set of this one architecture, marked by the a.
constexpr char kHopper[] = "sm_90a";

void constant(std::string& text, const char* name, int value) {
  text += std::string("  static constexpr int ") + name + " = " + std::to_string(value) + ";\n";
}

void constant(std::string& text, const char* name, bool value) {
  text += std::string("  static constexpr bool ") + name + (value ? " = true;\n" : " = false;\n");
}

void element_constants(std::string& text, const AttentionShape& shape) {
  text += std::string("  using Element = jfa::ptx::") +
          (shape.element == Element::kBFloat16 ? "BFloat16" : "Float16") + ";\n";
  constant(text, "kHeadDim", static_cast<int>(shape.head_dim));
}

// The part of a Config that says what is computed. A feature that is off is a constant, so it costs
// nothing.
void feature_constants(std::string& text, const AttentionSpec& spec) {
  constant(text, "kWindowed", spec.windowed());
  constant(text, "kSoftcap", spec.softcap > 0.0);
  constant(text, "kAlibi", spec.alibi);
  constant(text, "kDropout", spec.dropout());
  // attention/score_transform.cuh: only a positive scale can stay out of the scores.
  constant(text, "kScoresScaled", spec.softcap > 0.0 || spec.alibi || !(spec.softmax_scale > 0.0));
}

// checks: what must hold of Config, see needs_shared().
std::string program(const std::string& include, const std::string& config, int threads, int ctas,
                    const std::string& entry, const std::string& params, const std::string& call,
                    const std::string& checks = "") {
  return "#include <" + include + ">\n\nstruct Config {\n" + config + "};\n" + checks +
         "\nextern \"C\" __global__ void __launch_bounds__(" + std::to_string(threads) + ", " +
         std::to_string(ctas) + ") " + entry + "(const __grid_constant__ jfa::" + params +
         " params) {\n  extern __shared__ __align__(1024) unsigned char shared[];\n  " + call +
         ";\n}\n";
}

// Shared memory is counted by the host, which asks for it, and by the device, which lays it out:
// the compiler compares.
std::string needs_shared(const std::string& shapes, int bytes) {
  return "static_assert(jfa::" + shapes + "<Config>::kSharedBytes == " + std::to_string(bytes) +
         ", \"the host asks for other than this\");\n";
}

// 0 where the name is not "sm_" and digits: with a letter behind them it is another architecture.
int architecture_number(const std::string& name) {
  const std::string prefix = "sm_";
  if (name.compare(0, prefix.size(), prefix) != 0) return 0;
  const char* const end = name.data() + name.size();
  int number = 0;
  return std::from_chars(name.data() + prefix.size(), end, number).ptr == end ? number : 0;
}

Status check_head_dim(const AttentionShape& shape) {
  if (shape.head_dim > 0 && shape.head_dim <= 256 && shape.head_dim % 8 == 0) return Status();
  return Status::unimplemented("head_dim must be a multiple of 8 up to 256, got " +
                               std::to_string(shape.head_dim) + ".");
}

bool is_hopper(const Target& target) { return target.architecture == "sm_90"; }

Status check_hopper(const Target& target) {
  if (is_hopper(target)) return Status();
  return Status::unimplemented("The sm90 family runs on compute capability 9.0 alone, not on " +
                               target.architecture + ".");
}

Status check_fits(int shared_bytes, const Target& target) {
  if (shared_bytes <= target.shared_bytes) return Status();
  return Status::invalid_argument("The tiles need " + std::to_string(shared_bytes) +
                                  " bytes of shared memory; " + target.architecture + " has " +
                                  std::to_string(target.shared_bytes) + " for a CTA.");
}

// The tiles that are forced, or else the table's; they fit into the target's shared memory.
template <typename Tiles>
StatusOr<Tiles> chosen_tiles(const std::optional<TileOverride>& forced, const AttentionSpec& spec,
                             const AttentionShape& shape, const Target& target,
                             StatusOr<Tiles> (*from_table)(const AttentionSpec&,
                                                           const AttentionShape&, const Target&),
                             int (*shared_bytes)(const Tiles&, int)) {
  const int head_dim = static_cast<int>(shape.head_dim);
  Tiles tiles{};
  if (forced && !forced->numbers.empty()) {
    tiles = forced->as<Tiles>();
  } else {
    JFA_ASSIGN_OR_RETURN(tiles, from_table(spec, shape, target));
  }
  JFA_RETURN_IF_ERROR(check_fits(shared_bytes(tiles, head_dim), target));
  return tiles;
}

// What every Config begins with.
std::string config_of(const AttentionSpec& spec, const AttentionShape& shape, int tile_q,
                      int tile_k) {
  std::string config;
  element_constants(config, shape);
  constant(config, "kTileQ", tile_q);
  constant(config, "kTileK", tile_k);
  feature_constants(config, spec);
  return config;
}

StatusOr<ForwardSpecialization> sm80_forward(const AttentionSpec& spec, const AttentionShape& shape,
                                             const Target& target,
                                             const std::optional<TileOverride>& forced) {
  const int head_dim = static_cast<int>(shape.head_dim);
  JFA_ASSIGN_OR_RETURN(
      const sm80::ForwardTiles tiles,
      chosen_tiles(forced, spec, shape, target, sm80::forward_tiles, sm80::forward_shared_bytes));
  const int shared_bytes = sm80::forward_shared_bytes(tiles, head_dim);

  std::string config = config_of(spec, shape, tiles.tile_q, tiles.tile_k);
  constant(config, "kWarps", tiles.warps);
  constant(config, "kScoreUnroll", tiles.score_unroll);
  const std::string entry = "flash_forward_sm80";
  const std::string source =
      program("sm80/forward.cuh", config, tiles.warps * 32, tiles.ctas, entry, "ForwardParams",
              "jfa::sm80::forward<Config>(params, shared)",
              needs_shared("sm80::ForwardShapes", shared_bytes));
  return ForwardSpecialization{
      Family::kSm80,
      sm80::describe(tiles),
      tiles.tile_q,
      tiles.tile_k,
      {{source, target.architecture}, entry, tiles.warps * 32, shared_bytes}};
}

StatusOr<ForwardSpecialization> sm90_forward(const AttentionSpec& spec, const AttentionShape& shape,
                                             const Target& target,
                                             const std::optional<TileOverride>& forced) {
  const int head_dim = static_cast<int>(shape.head_dim);
  JFA_ASSIGN_OR_RETURN(
      const sm90::ForwardTiles tiles,
      chosen_tiles(forced, spec, shape, target, sm90::forward_tiles, sm90::forward_shared_bytes));
  const int shared_bytes = sm90::forward_shared_bytes(tiles, head_dim);

  std::string config = config_of(spec, shape, tiles.tile_q, tiles.tile_k);
  constant(config, "kQueryStages", tiles.query_stages);
  constant(config, "kKeyStages", tiles.key_stages);
  constant(config, "kValueStages", tiles.value_stages);
  constant(config, "kProbBuffers", tiles.prob_buffers);
  const std::string entry = "flash_forward_sm90";
  const int threads = sm90::forward_threads(tiles);
  const std::string source =
      program("sm90/forward.cuh", config, threads, 1, entry, "Sm90ForwardParams",
              "jfa::sm90::forward<Config>(params, shared)",
              needs_shared("sm90::ForwardShapes", shared_bytes));
  return ForwardSpecialization{Family::kSm90,
                               sm90::describe(tiles),
                               tiles.tile_q,
                               tiles.tile_k,
                               {{source, kHopper}, entry, threads, shared_bytes}};
}

KernelSpecialization backward_preprocess(const AttentionShape& shape, const Target& target) {
  std::string config;
  element_constants(config, shape);
  const std::string entry = "flash_backward_preprocess";
  const std::string source =
      program("portable/backward_preprocess.cuh", config, kPreprocessThreads, 1, entry,
              "BackwardParams", "jfa::portable::backward_preprocess<Config>(params)");
  return {{source, target.architecture}, entry, kPreprocessThreads, 0};
}

// With what the tiles of every family have.
template <class Tiles>
BackwardSpecialization backward_of(Family family, const Tiles& tiles) {
  BackwardSpecialization result;
  result.family = family;
  result.tiles = describe(tiles);
  result.tile_q = tiles.tile_q;
  result.tile_k = tiles.tile_k;
  return result;
}

StatusOr<BackwardSpecialization> sm80_backward(const AttentionSpec& spec,
                                               const AttentionShape& shape, const Target& target,
                                               const std::optional<TileOverride>& forced) {
  const int head_dim = static_cast<int>(shape.head_dim);
  JFA_ASSIGN_OR_RETURN(
      const sm80::BackwardTiles tiles,
      chosen_tiles(forced, spec, shape, target, sm80::backward_tiles, sm80::backward_shared_bytes));
  const int shared_bytes = sm80::backward_shared_bytes(tiles, head_dim);

  std::string layout = config_of(spec, shape, tiles.tile_q, tiles.tile_k);
  constant(layout, "kWarps", tiles.warps);
  constant(layout, "kScoreRowWarps", tiles.score_row_warps);
  constant(layout, "kKeyRowWarps", tiles.key_row_warps);
  constant(layout, "kQueryRowWarps", tiles.query_row_warps);
  constant(layout, "kStages", tiles.stages);
  constant(layout, "kScoreUnroll", tiles.score_unroll);
  const std::string postprocess_entry = "flash_backward_postprocess_sm80";
  const std::string postprocess =
      program("sm80/backward.cuh", layout, tiles.warps * 32, 1, postprocess_entry, "BackwardParams",
              "jfa::sm80::backward_postprocess<Config>(params, shared)");

  constant(layout, "kDeterministic", spec.deterministic);
  const std::string entry = "flash_backward_sm80";
  const std::string source =
      program("sm80/backward.cuh", layout, tiles.warps * 32, tiles.ctas, entry, "BackwardParams",
              "jfa::sm80::backward<Config>(params, shared)",
              needs_shared("sm80::BackwardShapes", shared_bytes));
  BackwardSpecialization result = backward_of(Family::kSm80, tiles);
  result.first = backward_preprocess(shape, target);
  result.main = {{source, target.architecture}, entry, tiles.warps * 32, shared_bytes};
  result.postprocess = {{postprocess, target.architecture},
                        postprocess_entry,
                        tiles.warps * 32,
                        sm80::backward_postprocess_shared_bytes(tiles, head_dim)};
  return result;
}

StatusOr<BackwardSpecialization> sm90_split_backward(const AttentionSpec& spec,
                                                     const AttentionShape& shape,
                                                     const Target& target,
                                                     const std::optional<TileOverride>& forced) {
  const int head_dim = static_cast<int>(shape.head_dim);
  JFA_ASSIGN_OR_RETURN(const sm90::SplitBackwardTiles tiles,
                       chosen_tiles(forced, spec, shape, target, sm90::split_backward_tiles,
                                    sm90::split_backward_shared_bytes));
  std::string dq_config = config_of(spec, shape, tiles.dq_tile_q, tiles.dq_tile_k);
  constant(dq_config, "kQueryStages", tiles.dq_query_stages);
  constant(dq_config, "kKeyStages", tiles.dq_key_stages);
  constant(dq_config, "kValueStages", tiles.dq_value_stages);
  const std::string dq_entry = "flash_query_gradient_sm90";
  const int dq_threads = sm90::query_gradient_threads(tiles);
  const std::string dq_source =
      program("sm90/query_gradient.cuh", dq_config, dq_threads, 1, dq_entry,
              "Sm90DealtBackwardParams", "jfa::sm90::query_gradient<Config>(params, shared)",
              needs_shared("sm90::QueryGradientShapes",
                           sm90::query_gradient_shared_bytes(tiles, head_dim)));

  std::string config = config_of(spec, shape, tiles.tile_q, tiles.tile_k);
  constant(config, "kQueryStages", tiles.query_stages);
  constant(config, "kDoutStages", tiles.dout_stages);
  constant(config, "kClusterCtas", 1);
  const std::string entry = "flash_key_gradient_sm90";
  const std::string kernel = sm90::is_wide(tiles) ? "wide_key_gradient" : "key_gradient";
  const std::string source = program(
      "sm90/" + kernel + ".cuh", config, sm90::kBackwardThreads, 1, entry,
      "Sm90DealtBackwardParams", "jfa::sm90::" + kernel + "<Config>(params, shared)",
      needs_shared(sm90::is_wide(tiles) ? "sm90::WideKeyGradientShapes" : "sm90::KeyGradientShapes",
                   sm90::key_gradient_shared_bytes(tiles, head_dim)));
  BackwardSpecialization result = backward_of(Family::kSm90Split, tiles);
  result.first = {{dq_source, kHopper},
                  dq_entry,
                  dq_threads,
                  sm90::query_gradient_shared_bytes(tiles, head_dim)};
  result.main = {{source, kHopper},
                 entry,
                 sm90::kBackwardThreads,
                 sm90::key_gradient_shared_bytes(tiles, head_dim),
                 /*starts_early=*/true};
  result.dq_tile_q = tiles.dq_tile_q;
  result.dq_tile_k = tiles.dq_tile_k;
  return result;
}

StatusOr<BackwardSpecialization> sm90_head_backward(const AttentionSpec& spec,
                                                    const AttentionShape& shape,
                                                    const Target& target,
                                                    const std::optional<TileOverride>& forced) {
  const int head_dim = static_cast<int>(shape.head_dim);
  JFA_ASSIGN_OR_RETURN(const sm90::HeadBackwardTiles tiles,
                       chosen_tiles(forced, spec, shape, target, sm90::head_backward_tiles,
                                    sm90::head_backward_shared_bytes));
  JFA_RETURN_IF_ERROR(sm90::check_head_fits(tiles.head_tiles * tiles.passes, tiles.tile_q, shape));
  const int shared_bytes = sm90::head_backward_shared_bytes(tiles, head_dim);
  std::string config = config_of(spec, shape, tiles.tile_q, tiles.tile_k);
  constant(config, "kQueryStages", tiles.query_stages);
  constant(config, "kDoutStages", tiles.dout_stages);
  constant(config, "kHeadTiles", tiles.head_tiles);
  constant(config, "kHeadPasses", tiles.passes);
  const std::string entry = "flash_head_backward_sm90";
  const std::string source =
      program("sm90/head_backward.cuh", config, sm90::kHeadBackwardThreads, 1, entry,
              "Sm90HeadBackwardParams", "jfa::sm90::head_backward<Config>(params, shared)",
              needs_shared("sm90::HeadBackwardShapes", shared_bytes));
  BackwardSpecialization result = backward_of(Family::kSm90Head, tiles);
  result.main = {{source, kHopper}, entry, sm90::kHeadBackwardThreads, shared_bytes};
  result.head_tiles = tiles.head_tiles * tiles.passes;
  return result;
}

StatusOr<BackwardSpecialization> sm90_cluster_backward(const AttentionSpec& spec,
                                                       const AttentionShape& shape,
                                                       const Target& target,
                                                       const std::optional<TileOverride>& forced) {
  const int head_dim = static_cast<int>(shape.head_dim);
  JFA_ASSIGN_OR_RETURN(const sm90::ClusterBackwardTiles tiles,
                       chosen_tiles(forced, spec, shape, target, sm90::cluster_backward_tiles,
                                    sm90::cluster_backward_shared_bytes));
  if (head_dim <= 128)
    return Status::unimplemented("The sm90cluster family is for head dims above 128, got " +
                                 std::to_string(head_dim) + ".");
  if (spec.deterministic)
    return Status::unimplemented(
        "The sm90cluster family adds to dq in any order, not as deterministic=True asks for; "
        "sm90split has one.");
  const int shared_bytes = sm90::cluster_backward_shared_bytes(tiles, head_dim);
  std::string config = config_of(spec, shape, tiles.tile_q, tiles.tile_k);
  constant(config, "kQueryStages", tiles.query_stages);
  constant(config, "kDoutStages", tiles.dout_stages);
  constant(config, "kClusterCtas", sm90::kClusterCtas);
  const std::string file = "sm90/cluster_backward.cuh";
  const std::string postprocess_entry = "flash_cluster_backward_postprocess_sm90";
  const std::string postprocess =
      program(file, config, sm90::kBackwardPostprocessThreads, 1, postprocess_entry,
              "BackwardParams", "jfa::sm90::cluster_backward_postprocess<Config>(params, shared)");
  const std::string entry = "flash_cluster_backward_sm90";
  const std::string source =
      program(file, config, sm90::kBackwardThreads, 1, entry, "Sm90DealtBackwardParams",
              "jfa::sm90::cluster_backward<Config>(params, shared)",
              needs_shared("sm90::ClusterBackwardShapes", shared_bytes));
  BackwardSpecialization result = backward_of(Family::kSm90Cluster, tiles);
  result.first = backward_preprocess(shape, target);
  result.main = {{source, kHopper},      entry,
                 sm90::kBackwardThreads, shared_bytes,
                 /*starts_early=*/true,  sm90::kClusterCtas};
  result.postprocess = {{postprocess, kHopper},
                        postprocess_entry,
                        sm90::kBackwardPostprocessThreads,
                        sm90::cluster_postprocess_shared_bytes(tiles, head_dim),
                        /*starts_early=*/true};
  return result;
}

StatusOr<BackwardSpecialization> sm90_backward(const AttentionSpec& spec,
                                               const AttentionShape& shape, const Target& target,
                                               const std::optional<TileOverride>& forced) {
  const int head_dim = static_cast<int>(shape.head_dim);
  JFA_ASSIGN_OR_RETURN(
      const sm90::BackwardTiles tiles,
      chosen_tiles(forced, spec, shape, target, sm90::backward_tiles, sm90::backward_shared_bytes));
  const int shared_bytes = sm90::backward_shared_bytes(tiles, head_dim);

  std::string config = config_of(spec, shape, tiles.tile_q, tiles.tile_k);
  constant(config, "kQueryStages", tiles.query_stages);
  constant(config, "kDoutStages", tiles.dout_stages);
  // Consumers with softcap and a wide head leave no registers for other warps.
  const bool leaves_registers = spec.softcap == 0.0 || head_dim <= 96;
  if (spec.deterministic && !leaves_registers)
    return Status::unimplemented(
        "With softcap the fused backward of the sm90 family is deterministic up to head dim 96; "
        "that of sm90split is so for every head dim.");
  const bool serves_rows = !spec.deterministic && leaves_registers;
  const int prepared_rows = sm90::prepared_rows(head_dim);
  constant(config, "kServesRows", serves_rows);
  constant(config, "kPreparedRows", prepared_rows);
  constant(config, "kDeterministic", spec.deterministic);
  const std::string file = "sm90/backward.cuh";
  const std::string postprocess_entry = "flash_backward_postprocess_sm90";
  const std::string postprocess =
      program(file, config, sm90::kBackwardPostprocessThreads, 1, postprocess_entry,
              "BackwardParams", "jfa::sm90::backward_postprocess<Config>(params, shared)");
  const std::string entry = "flash_backward_sm90";
  const std::string source =
      program(file, config, sm90::kBackwardThreads, 1, entry, "Sm90FusedBackwardParams",
              "jfa::sm90::backward<Config>(params, shared)",
              needs_shared("sm90::BackwardShapes", shared_bytes));
  BackwardSpecialization result = backward_of(Family::kSm90, tiles);
  result.first = backward_preprocess(shape, target);
  result.main = {
      {source, kHopper}, entry, sm90::kBackwardThreads, shared_bytes, /*starts_early=*/true};
  result.postprocess = {{postprocess, kHopper},
                        postprocess_entry,
                        sm90::kBackwardPostprocessThreads,
                        sm90::backward_postprocess_shared_bytes(tiles, head_dim),
                        /*starts_early=*/true};
  result.prepared_rows = serves_rows ? prepared_rows : 0;
  return result;
}

}  // namespace

std::vector<KernelSpecialization> BackwardSpecialization::kernels() const {
  std::vector<KernelSpecialization> kernels;
  if (first) kernels.push_back(*first);
  kernels.push_back(main);
  if (postprocess) kernels.push_back(*postprocess);
  return kernels;
}

StatusOr<Target> device_target(int compute_capability, int shared_bytes, int multiprocessors) {
  if (compute_capability < kOldestComputeCapability) {
    return Status::unimplemented(
        "The kernels need compute capability 8.0 (Ampere) or newer; this "
        "device has " +
        std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10) +
        ".");
  }
  JFA_ASSIGN_OR_RETURN(const std::vector<int> known, runtime::supported_architectures());
  int best = 0;
  for (const int architecture : known) {
    if (architecture <= compute_capability && architecture / 10 == compute_capability / 10)
      best = architecture;
  }
  if (best == 0) {
    return Status::failed_precondition(
        "This NVRTC does not compile for compute capability " +
        std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10) +
        ". Install a newer one: pip install --upgrade nvidia-cuda-nvrtc.");
  }
  return Target{"sm_" + std::to_string(best), shared_bytes, multiprocessors};
}

StatusOr<Target> named_target(const std::string& architecture) {
  const int number = architecture_number(architecture);
  if (number < kOldestComputeCapability) {
    return Status::invalid_argument("architecture must be sm_80 or newer, such as sm_90, got '" +
                                    architecture + "'.");
  }
  // CUDA C++ Programming Guide, table of technical specifications: 163 KB for 8.0 and 8.7, 227 KB
  // for 9.0 to 11.x, 99 KB for the other parts of Ampere, Ada and Blackwell.
  const bool large = number >= 90 && number < 120;
  const bool middle = number == 80 || number == 87;
  // As many multiprocessors as an H100 SXM has.
  constexpr int kMultiprocessors = 132;
  return Target{architecture, (large ? 227 : middle ? 163 : 99) * 1024, kMultiprocessors};
}

StatusOr<ForwardSpecialization> specialize_forward(const AttentionSpec& spec,
                                                   const AttentionShape& shape,
                                                   const Target& target,
                                                   const std::optional<TileOverride>& forced) {
  JFA_RETURN_IF_ERROR(check_head_dim(shape));
  if (forced ? forced->family == "sm90" : is_hopper(target)) {
    JFA_RETURN_IF_ERROR(check_hopper(target));
    return sm90_forward(spec, shape, target, forced);
  }
  return sm80_forward(spec, shape, target, forced);
}

StatusOr<BackwardSpecialization> specialize_backward(const AttentionSpec& spec,
                                                     const AttentionShape& shape,
                                                     const Target& target,
                                                     const std::optional<TileOverride>& forced) {
  JFA_RETURN_IF_ERROR(check_head_dim(shape));
  const bool sm90 = forced ? forced->family != "sm80" : is_hopper(target);
  if (!sm90) return sm80_backward(spec, shape, target, forced);
  JFA_RETURN_IF_ERROR(check_hopper(target));
  if (forced ? forced->family == "sm90head" : sm90::takes_heads(spec, shape, target))
    return sm90_head_backward(spec, shape, target, forced);
  if (forced ? forced->family == "sm90cluster" : sm90::takes_clusters(spec, shape, target))
    return sm90_cluster_backward(spec, shape, target, forced);
  const bool split =
      forced ? forced->family == "sm90split" : sm90::splits_backward(spec, shape, target);
  return split ? sm90_split_backward(spec, shape, target, forced)
               : sm90_backward(spec, shape, target, forced);
}

}  // namespace jax_flash_attn::launchers
