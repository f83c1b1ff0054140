#include "launchers/sm90_tiles.h"

#include <params/backward_params.h>

#include <algorithm>
#include <cstddef>
#include <limits>

#include "launchers/attention_params.h"
#include "launchers/tile_table.h"

namespace jax_flash_attn::launchers::sm90 {
namespace {

using runtime::Status;
using runtime::StatusOr;

template <typename Tiles>
struct Row {
  int max_head_dim;
  Features features;
  Tiles tiles;
  std::int64_t max_seqlen_q = kAnySeqlen;  // one of kSeqlenLimits
};

// Rows are tried from the top; the first that serves the head dim, the features and the length is
// taken.
//                                tile_q  tile_k  query, key, value stages  prob_buffers
constexpr Row<ForwardTiles> kForward[] = {
    {64, Features::kMasked, {128, 128, 2, 3, 3, 2}, 1024},
    {48, Features::kNoDropout, {192, 128, 2, 2, 2, 1}},
    {48, Features::kAny, {192, 96, 2, 2, 2, 1}},
    {64, Features::kAny, {192, 128, 2, 2, 2, 1}},
    {96, Features::kFull, {192, 96, 2, 2, 2, 1}},
    {128, Features::kAny, {128, 128, 2, 2, 2, 2}},
    {192, Features::kFull, {128, 96, 1, 2, 2, 2}},
    {192, Features::kNoDropout, {128, 112, 1, 2, 2, 1}},
    {192, Features::kAny, {128, 64, 2, 2, 2, 1}},
    {kAnyHeadDim, Features::kMasked, {128, 64, 1, 2, 3, 1}, 1024},
    {kAnyHeadDim, Features::kNoDropout, {128, 80, 1, 2, 2, 1}},
    {kAnyHeadDim, Features::kAny, {128, 48, 2, 2, 2, 1}},
};

//                                 tile_q  tile_k  query, dout stages
constexpr Row<BackwardTiles> kBackward[] = {
    {64, Features::kPlain, {128, 128, 2, 2}},
    {96, Features::kAny, {64, 128, 2, 2}},
    {128, Features::kNoDropout, {64, 128, 2, 2}},
    {128, Features::kNoSoftcap, {64, 128, 2, 2}},
};

// Whether every row has key tiles of `tile_k`.
template <typename Tiles, std::size_t kRows>
constexpr bool key_tiles_are(const Row<Tiles> (&rows)[kRows], int tile_k) {
  for (const Row<Tiles>& row : rows)
    if (row.tiles.tile_k != tile_k) return false;
  return true;
}
constexpr int kBackwardTileK = 128;
static_assert(key_tiles_are(kBackward, kBackwardTileK),
              "suits_one_round() is asked before a row is chosen");

// For what kBackward leaves, short sequences, and deterministic calls but for long ones that are of
// narrow heads or causal.
//                                      tile_q  tile_k  query, dout stages; of dq: tile_q  tile_k
//                                      query, key, value stages
constexpr Row<SplitBackwardTiles> kSplitBackward[] = {
    {64, Features::kAny, {64, 128, 4, 4, 128, 64, 2, 4, 4}},
    {96, Features::kAny, {64, 128, 3, 3, 128, 64, 1, 3, 2}},
    {128, Features::kPlain, {64, 128, 3, 3, 128, 64, 1, 3, 2}},
    {128, Features::kNoDropout, {64, 128, 3, 2, 128, 64, 1, 3, 2}},
    {128, Features::kAny, {64, 64, 3, 3, 128, 48, 2, 3, 3}},
    {192, Features::kNoDropout, {64, 64, 3, 3, 128, 64, 1, 3, 2}},
    {192, Features::kAny, {64, 64, 3, 3, 128, 48, 1, 3, 3}},
    {kAnyHeadDim, Features::kAny, {64, 64, 2, 2, 128, 32, 1, 3, 3}},
};

// For long sequences of wide heads.
//                                              tile_q  tile_k  query, dout stages
constexpr Row<ClusterBackwardTiles> kClusterBackward[] = {
    {192, Features::kAny, {64, 64, 3, 3}},
    {kAnyHeadDim, Features::kAny, {64, 64, 2, 2}},
};
constexpr int kClusterTileK = 64;
static_assert(key_tiles_are(kClusterBackward, kClusterTileK),
              "suits_clusters() is asked before a row is chosen");

// For short sequences of many heads.
//                                        tile_q  tile_k  query, dout stages  head_tiles  passes
constexpr Row<HeadBackwardTiles> kHeadBackward[] = {
    {64, Features::kNoSoftcap, {64, 128, 3, 2, 8, 1}, 512},
    {64, Features::kNoSoftcap, {64, 128, 3, 2, 8, 2}, 1024},
};
constexpr int kHeadTileQ = 64;  // of every row
constexpr int kHeadTileK = 128;
constexpr int kHeadTiles = 8;
constexpr int kHeadPasses = 2;
constexpr std::int64_t kHeadSeqlen = 512;  // of one pass
// From here on two are faster than the fused form under a causal mask, and than the split form,
// which adds in the same order, where gradients are deterministic (docs/tuning.md).
constexpr std::int64_t kHeadPassesSeqlen = 769;
static_assert(is_seqlen_limit(kHeadSeqlen) && is_seqlen_limit(kHeadPassesSeqlen - 1),
              "calls of one plan run the same kernels");
template <std::size_t kRows>
constexpr bool heads_are_known(const Row<HeadBackwardTiles> (&rows)[kRows]) {
  for (const Row<HeadBackwardTiles>& row : rows)
    if (row.tiles.tile_q != kHeadTileQ || row.tiles.tile_k != kHeadTileK ||
        row.tiles.head_tiles != kHeadTiles ||
        row.tiles.passes != (row.max_seqlen_q > kHeadSeqlen ? kHeadPasses : 1))
      return false;
  return true;
}
static_assert(heads_are_known(kHeadBackward), "suits_heads() is asked before a row is chosen");

template <typename Tiles, std::size_t kRows, typename SharedBytes>
StatusOr<Tiles> choose(const Row<Tiles> (&rows)[kRows], const AttentionSpec& spec,
                       const AttentionShape& shape, const Target& target,
                       SharedBytes shared_bytes) {
  const int head_dim = static_cast<int>(shape.head_dim);
  for (const Row<Tiles>& row : rows) {
    if (head_dim <= row.max_head_dim && serves(row.features, spec) &&
        shape.seqlen_q <= row.max_seqlen_q &&
        shared_bytes(row.tiles, head_dim) <= target.shared_bytes)
      return row.tiles;
  }
  return Status::unimplemented("No row of this table of the sm90 family serves head_dim " +
                               std::to_string(head_dim) + " and the call's features in " +
                               std::to_string(target.shared_bytes) + " bytes of shared memory.");
}

// Of the rings and the threads that sm90/key_walk.cuh gives a kernel.
int key_walk_shared_bytes(int query_operands, int tile_q, int tile_k, int query_stages,
                          int key_stages, int value_stages, int head_dim) {
  const int places = 2 * 16 * query_stages;
  const int barriers = 2 * 8 * (query_stages + key_stages + value_stages);
  return query_operands * query_stages * tile_bytes(tile_q, head_dim) +
         (key_stages + value_stages) * tile_bytes(tile_k, head_dim) + places + barriers;
}
int key_walk_threads(int tile_q) { return (tile_q / 64 + 1) * 128; }

// Up to how many queries the split backward is the faster one where both serve. Its two products
// more cost the same at every length, and power: where calls follow each other, clocks are lower.
// What it saves weighs less, the longer the walk of a CTA. Dropout is drawn twice. Measurements are
// in docs/tuning.md.
constexpr std::int64_t kSplitNarrow = 512;  // head dims up to 64
constexpr std::int64_t kSplitWide = 768;
constexpr std::int64_t kSplitWideMasked = 1024;
constexpr std::int64_t kSplitDeterministic = 1024;      // head dims up to 64
constexpr std::int64_t kSplitWideDeterministic = 4096;  // up to 128 and causal; above those always
static_assert(is_seqlen_limit(kSplitNarrow) && is_seqlen_limit(kSplitWide) &&
                  is_seqlen_limit(kSplitWideMasked) && is_seqlen_limit(kSplitDeterministic) &&
                  is_seqlen_limit(kSplitWideDeterministic),
              "calls of one plan run the same kernels");

// From so many queries on, causal calls with one round of key tiles are better fused. That takes as
// long as the longest walk, the split form as long as the longest of each kernel (279 and 236
// TFLOP/s for 16 heads of 1,024 queries at head dim 128). Not where a key head has several query
// heads, all of which a key tile walks.
constexpr std::int64_t kOneRoundSeqlen = 512;

// Of all query heads that read a key head.
std::int64_t head_query_tiles(const AttentionShape& shape, int tile_q) {
  return shape.heads / std::max<std::int64_t>(1, shape.heads_k) * ceil_div(shape.seqlen_q, tile_q);
}

// Whether units of work, one at a time for each of `workers`, leave so few of them idle in the last
// round that it takes at most `gain` times as long as if none were.
bool fills(std::int64_t units, std::int64_t workers, double gain) {
  if (units == 0 || workers == 0) return false;
  const double rounds = static_cast<double>(ceil_div(units, workers));
  return rounds * static_cast<double>(workers) <= gain * static_cast<double>(units);
}

// By how much CTAs that take whole heads are faster than the split form, or more (docs/tuning.md):
// up to that they may take longer because some idle in the last round.
constexpr double kHeadGain = 1.2;

// From how many queries on clusters are faster than the split form, as measured at head dim 256: by
// 2 to 5% at 2k, 4% at 4k and 7 to 13% at 8k and 16k without a mask, by 4 to 8% at 8k and 16k
// causal. What is fixed of a group of key tiles weighs less, the longer its walk.
constexpr int kClusterHeadDim = 192;
constexpr std::int64_t kClusterFull = 2048;
constexpr std::int64_t kClusterCausal = 8192;
constexpr double kClusterGain = 1.03;
// Clusters leave multiprocessors over, and how many run at a time differs from GPU to GPU: on an
// H200 30. Where there are fewer, the last round of a short call takes longer than is thought here.
constexpr int kClusters = 30;
constexpr int kMultiprocessorsForThem = 132;
// Above this head dim, clusters are also faster where all heads together have so few groups of key
// tiles that both kernels of the split form leave multiprocessors idle.
constexpr int kFewGroupsHeadDim = 128;

// Up to how many rounds of clusters that is (docs/tuning.md). Under a causal mask short walks fill
// the last round.
int few_group_rounds(const AttentionSpec& spec, const AttentionShape& shape) {
  if (spec.causal()) return shape.seqlen_k < 512 ? 1 : shape.head_dim <= 192 ? 2 : 3;
  return shape.seqlen_k < 1024 || shape.head_dim <= 160 ? 1 : 2;
}

std::int64_t split_seqlen(const AttentionSpec& spec, std::int64_t head_dim) {
  if (spec.deterministic) {
    if (head_dim <= 64) return kSplitDeterministic;
    // Not with softcap or dropout, whose consumers leave idle warps no registers.
    return spec.causal() && spec.softcap == 0.0 && !spec.dropout()
               ? kSplitWideDeterministic
               : std::numeric_limits<std::int64_t>::max();
  }
  if (spec.dropout()) return -1;
  if (head_dim <= 64) return kSplitNarrow;
  return spec.windowed() ? kSplitWideMasked : kSplitWide;
}

template <typename Tiles, std::size_t kRows>
constexpr bool limits_are_known(const Row<Tiles> (&rows)[kRows]) {
  for (const Row<Tiles>& row : rows)
    if (!is_seqlen_limit(row.max_seqlen_q)) return false;
  return true;
}
static_assert(limits_are_known(kForward) && limits_are_known(kBackward) &&
                  limits_are_known(kSplitBackward) && limits_are_known(kHeadBackward) &&
                  limits_are_known(kClusterBackward),
              "calls of one plan run the same kernels");

}  // namespace

StatusOr<ForwardTiles> forward_tiles(const AttentionSpec& spec, const AttentionShape& shape,
                                     const Target& target) {
  return choose(kForward, spec, shape, target, forward_shared_bytes);
}

StatusOr<BackwardTiles> backward_tiles(const AttentionSpec& spec, const AttentionShape& shape,
                                       const Target& target) {
  return choose(kBackward, spec, shape, target, backward_shared_bytes);
}

bool suits_one_round(const AttentionSpec& spec, const AttentionShape& shape, int multiprocessors) {
  if (spec.deterministic) return false;
  // Query heads come in parts where key tiles leave multiprocessors idle; dq of the split form's
  // first kernel would not.
  if (shape.splits_query_heads()) return true;
  if (!spec.causal()) return false;
  if (shape.heads != shape.heads_k || shape.seqlen_q < kOneRoundSeqlen) return false;
  const std::int64_t key_tiles =
      ceil_div(shape.seqlen_k, kBackwardTileK) * shape.batch * shape.heads_k;
  return key_tiles > 0 && key_tiles <= multiprocessors;
}

bool splits_backward(const AttentionSpec& spec, const AttentionShape& shape, const Target& target) {
  if (!backward_tiles(spec, shape, target).ok()) return true;
  return shape.seqlen_q <= split_seqlen(spec, shape.head_dim) &&
         !suits_one_round(spec, shape, target.multiprocessors);
}

StatusOr<SplitBackwardTiles> split_backward_tiles(const AttentionSpec& spec,
                                                  const AttentionShape& shape,
                                                  const Target& target) {
  return choose(kSplitBackward, spec, shape, target, split_backward_shared_bytes);
}

StatusOr<HeadBackwardTiles> head_backward_tiles(const AttentionSpec& spec,
                                                const AttentionShape& shape, const Target& target) {
  return choose(kHeadBackward, spec, shape, target, head_backward_shared_bytes);
}

Status check_head_fits(int head_tiles, int tile_q, const AttentionShape& shape) {
  const std::int64_t query_tiles = head_query_tiles(shape, tile_q);
  if (query_tiles <= head_tiles) return Status();
  return Status::unimplemented("dq of " + std::to_string(head_tiles) +
                               " query tiles of a key head fits into shared memory; there are " +
                               std::to_string(query_tiles) + ".");
}

std::int64_t head_partial_tiles(const AttentionSpec& spec, const AttentionShape& shape) {
  if (head_query_tiles(shape, kHeadTileQ) <= kHeadTiles) return 0;
  const std::int64_t key_tiles = ceil_div(shape.seqlen_k, kHeadTileK);
  // Under a causal mask none that the last pass sees alone.
  const std::int64_t passes = ceil_div(ceil_div(shape.seqlen_q, kHeadTileQ), kHeadTiles);
  if (spec.causal() && shape.seqlen_q == shape.seqlen_k && shape.heads == shape.heads_k)
    return std::min(key_tiles, (passes - 1) * kHeadTiles * kHeadTileQ / kHeadTileK);
  return key_tiles;
}

std::int64_t head_ctas(const AttentionSpec& spec, const AttentionShape& shape,
                       int multiprocessors) {
  const std::int64_t ctas = std::min<std::int64_t>(multiprocessors, shape.batch * shape.heads_k);
  const std::int64_t of_cta =
      head_partial_tiles(spec, shape) * 2 * kHeadTileK * round_up(shape.head_dim, 16);
  if (of_cta == 0) return ctas;
  const std::int64_t workspace = shape.batch * shape.heads *
                                 round_up(shape.seqlen_q, jfa::kWorkspaceRowMultiple) *
                                 round_up(shape.head_dim, jfa::kWorkspaceColumnMultiple);
  return std::min(ctas, workspace / of_cta);
}

bool suits_heads(const AttentionSpec& spec, const AttentionShape& shape, int multiprocessors) {
  if (shape.seqlen_k == 0 || shape.splits_query_heads()) return false;
  const int passes = shape.seqlen_q > kHeadSeqlen ? kHeadPasses : 1;
  if (passes > 1 && (shape.seqlen_q < kHeadPassesSeqlen ||
                     !(spec.causal() || (spec.deterministic && !spec.windowed()))))
    return false;
  return head_query_tiles(shape, kHeadTileQ) <= kHeadTiles * passes &&
         fills(shape.batch * shape.heads_k, multiprocessors, kHeadGain) &&
         head_ctas(spec, shape, multiprocessors) >=
             std::min<std::int64_t>(multiprocessors, shape.batch * shape.heads_k);
}

bool takes_heads(const AttentionSpec& spec, const AttentionShape& shape, const Target& target) {
  // Deterministic gradients of a row do not depend on how many others there are: the split form
  // adds in the same order (sm90/key_order.cuh).
  return suits_heads(spec, shape, target.multiprocessors) &&
         head_backward_tiles(spec, shape, target).ok();
}

StatusOr<ClusterBackwardTiles> cluster_backward_tiles(const AttentionSpec& spec,
                                                      const AttentionShape& shape,
                                                      const Target& target) {
  return choose(kClusterBackward, spec, shape, target, cluster_backward_shared_bytes);
}

int cluster_backward_shared_bytes(const ClusterBackwardTiles& tiles, int head_dim) {
  constexpr int kKeyCtas = kClusterCtas - 1;
  constexpr int kStages = 2;  // of dscores on their way
  const int stages = tiles.query_stages + tiles.dout_stages;
  const int dscores = tiles.tile_q * tiles.tile_k * 2;
  // Of a key CTA, which exchanges probabilities of one step.
  constexpr int kPlaces = 2 * 16;
  const int key_cta = 2 * tile_bytes(tiles.tile_k, head_dim) +
                      stages * (tile_bytes(tiles.tile_q, head_dim) + tiles.tile_q * 4) +
                      tiles.tile_q * tiles.tile_k * 4 + kPlaces + 2 * 8 * (stages + 3);
  const int sent = (key_cta + 1023) / 1024 * 1024 + kStages * dscores;
  const int query_cta = kKeyCtas * (tile_bytes(tiles.tile_k, head_dim) + kStages * dscores) +
                        tiles.tile_q * ((head_dim + 15) / 16 * 16) * 4;
  return std::max(sent, query_cta) + 2 * 8 * (2 * kStages + 1 + kKeyConsumers) + 16;
}

int cluster_postprocess_shared_bytes(const ClusterBackwardTiles& tiles, int head_dim) {
  return tile_bytes(tiles.tile_q, head_dim);
}

std::string describe(const ClusterBackwardTiles& tiles) {
  return "sm90 cluster, " + std::to_string(tiles.tile_q) + "x" + std::to_string(tiles.tile_k) +
         ", " + std::to_string(tiles.query_stages) + " + " + std::to_string(tiles.dout_stages) +
         " stages";
}

bool suits_clusters(const AttentionSpec& spec, const AttentionShape& shape, int multiprocessors) {
  if (spec.deterministic || shape.head_dim <= kFewGroupsHeadDim) return false;
  if (spec.windowed() && !spec.causal()) return false;
  const std::int64_t clusters = multiprocessors * kClusters / kMultiprocessorsForThem;
  const std::int64_t groups =
      ceil_div(shape.seqlen_k, (kClusterCtas - 1) * kClusterTileK) * shape.batch * shape.heads_k;
  // With fewer key heads a cluster's walks are longer, those of the split form's dq are not.
  if (shape.heads == shape.heads_k && groups <= few_group_rounds(spec, shape) * clusters)
    return groups > 0;
  if (shape.head_dim <= kClusterHeadDim) return false;
  if (shape.seqlen_q < (spec.causal() ? kClusterCausal : kClusterFull)) return false;
  return fills(groups, clusters, kClusterGain);
}

bool takes_clusters(const AttentionSpec& spec, const AttentionShape& shape, const Target& target) {
  return suits_clusters(spec, shape, target.multiprocessors) &&
         cluster_backward_tiles(spec, shape, target).ok();
}

int head_backward_shared_bytes(const HeadBackwardTiles& tiles, int head_dim) {
  const int stages = tiles.query_stages + tiles.dout_stages;
  constexpr int kKeyTiles = 2 * kKeyConsumers;  // of 64 rows
  const int statistics = stages * tiles.tile_q * 4;
  constexpr int kPlaces = 4 * 16;
  constexpr int kStatisticsStages = 8;
  const int barriers = 2 * 8 * (stages + kKeyTiles + kKeyConsumers + kStatisticsStages);
  const int fp32_columns = (head_dim + 15) / 16 * 16;
  return kKeyTiles * tile_bytes(tiles.tile_k / kKeyConsumers, head_dim) +
         stages * tile_bytes(tiles.tile_q, head_dim) + tile_bytes(tiles.tile_q, tiles.tile_k) +
         tiles.head_tiles * tiles.tile_q * fp32_columns * 4 + statistics + kPlaces + barriers;
}

std::string describe(const HeadBackwardTiles& tiles) {
  return "sm90 head, " + std::to_string(tiles.tile_q) + "x" + std::to_string(tiles.tile_k) + ", " +
         std::to_string(tiles.query_stages) + " + " + std::to_string(tiles.dout_stages) +
         " stages, " + std::to_string(tiles.head_tiles) + " query tiles" +
         (tiles.passes > 1 ? ", up to " + std::to_string(tiles.passes) + " passes" : "");
}

int query_gradient_shared_bytes(const SplitBackwardTiles& tiles, int head_dim) {
  constexpr int kStatisticsStages = 2;
  return key_walk_shared_bytes(/*query_operands=*/2, tiles.dq_tile_q, tiles.dq_tile_k,
                               tiles.dq_query_stages, tiles.dq_key_stages, tiles.dq_value_stages,
                               head_dim) +
         kStatisticsStages * (tiles.dq_tile_q * 8 + 2 * 8);
}

int query_gradient_threads(const SplitBackwardTiles& tiles) {
  return key_walk_threads(tiles.dq_tile_q);
}

int key_gradient_shared_bytes(const SplitBackwardTiles& tiles, int head_dim) {
  const int stages = tiles.query_stages + tiles.dout_stages;
  const int statistics = stages * tiles.tile_q * 4;
  const int key_stages = is_wide(tiles) ? 1 : 2;
  constexpr int kPlaces = 2 * 16;
  // The wide kernel exchanges probabilities. It has a ring of k and one of v for two stages of
  // both, and the other one a barrier that lets its producer go on.
  const int probs_stages = is_wide(tiles) ? 1 : 0;
  const int gates = is_wide(tiles) ? 0 : 1;
  const int barriers = 2 * 8 * (stages + 2 + probs_stages + gates);
  return key_stages * 2 * tile_bytes(tiles.tile_k, head_dim) +
         stages * tile_bytes(tiles.tile_q, head_dim) + statistics +
         probs_stages * tiles.tile_q * tiles.tile_k * 4 + kPlaces + barriers;
}

int split_backward_shared_bytes(const SplitBackwardTiles& tiles, int head_dim) {
  return std::max(query_gradient_shared_bytes(tiles, head_dim),
                  key_gradient_shared_bytes(tiles, head_dim));
}

std::string describe(const SplitBackwardTiles& tiles) {
  return "sm90 split, dk and dv " + std::to_string(tiles.tile_q) + "x" +
         std::to_string(tiles.tile_k) + ", " + std::to_string(tiles.query_stages) + " + " +
         std::to_string(tiles.dout_stages) + " stages, dq " + std::to_string(tiles.dq_tile_q) +
         "x" + std::to_string(tiles.dq_tile_k) + ", " + std::to_string(tiles.dq_key_stages) +
         " + " + std::to_string(tiles.dq_value_stages) + " stages";
}

int forward_shared_bytes(const ForwardTiles& tiles, int head_dim) {
  return key_walk_shared_bytes(/*query_operands=*/1, tiles.tile_q, tiles.tile_k, tiles.query_stages,
                               tiles.key_stages, tiles.value_stages, head_dim);
}

int forward_threads(const ForwardTiles& tiles) { return key_walk_threads(tiles.tile_q); }

std::string describe(const ForwardTiles& tiles) {
  return "sm90 " + std::to_string(tiles.tile_q) + "x" + std::to_string(tiles.tile_k) + ", " +
         std::to_string(tiles.tile_q / 64) + " consumers, " + std::to_string(tiles.key_stages) +
         " + " + std::to_string(tiles.value_stages) + " stages";
}

int backward_shared_bytes(const BackwardTiles& tiles, int head_dim) {
  const int stages = tiles.query_stages + tiles.dout_stages;
  const int statistics = stages * tiles.tile_q * 4;
  const int barriers = 2 * 8 * (stages + 6);
  constexpr int kPlaces = 4 * 16;                      // of key tiles
  const int fp32_columns = (head_dim + 15) / 16 * 16;  // parts of dq, on the way to their sums
  constexpr int kService = 7 * 4096 + 3 * (2 * 16 + 4 * 8);  // sm90/row_service.cuh
  return 2 * tile_bytes(tiles.tile_k, head_dim) + stages * tile_bytes(tiles.tile_q, head_dim) +
         2 * tile_bytes(tiles.tile_q, tiles.tile_k) + tiles.tile_q * fp32_columns * 4 + statistics +
         barriers + kPlaces + kService;
}

int prepared_rows(int head_dim) { return head_dim > 64 ? 8 : 16; }

int backward_postprocess_shared_bytes(const BackwardTiles& tiles, int head_dim) {
  return tile_bytes(tiles.tile_q, head_dim);
}

std::string describe(const BackwardTiles& tiles) {
  return "sm90 " + std::to_string(tiles.tile_q) + "x" + std::to_string(tiles.tile_k) +
         ", 2 consumers, " + std::to_string(tiles.query_stages) + " + " +
         std::to_string(tiles.dout_stages) + " stages";
}

}  // namespace jax_flash_attn::launchers::sm90
