// Backward attention with mma.sync. With scores = scale q k^T, probs = exp(scores - lse) and
// dprobs = dout v^T, for every visible pair of a query tile and a key tile:
//
//   dv += probs^T dout      dscores = probs (dprobs - delta)
//   dk += scale dscores^T q     dq += scale dscores k
//
// One CTA owns one key tile of one key head and walks the query tiles that it has dk and dv of, of
// all query heads of its group or some of one's (attention/query_group.cuh), so dk and dv stay in
// registers, are reduced over the group there, and are written once. dq gathers in fp32 in global
// memory (tile/global_accumulator.cuh); the postprocess kernel scales and rounds it.
//
//   barrier             what it orders
//   operands landed     q, dout and row statistics of this step are visible; all warps are done
//                       with the probs, dscores and operand stages of the last one
//   scores stored       probs and dscores of all warps are visible
//   operands free       (single stages only) all warps are done with q and dout of this step
//
// With two stages the next step's operands travel during the whole step.
//
// deterministic: the CTAs that add to one query tile take turns in the order of their key tiles,
// counted in params.turns. A CTA waits only for CTAs with smaller block indices, which the hardware
// starts first, so it never waits for one that can't run.
#pragma once

#include <attention/containment.cuh>
#include <attention/dropout.cuh>
#include <attention/head_address.cuh>
#include <attention/query_group.cuh>
#include <attention/score_layout.cuh>
#include <attention/score_transform.cuh>
#include <attention/visible_range.cuh>
#include <params/backward_params.h>
#include <ptx/element.cuh>
#include <tile/copy.cuh>
#include <tile/fragment.cuh>
#include <tile/global_accumulator.cuh>

namespace jfa::sm80 {

// Three products share the warps of a CTA in three layouts: kWarps = rows x columns of warps, which
// take 16-row and 16-column blocks in turn.
template <class Config>
struct BackwardShapes {
  static constexpr int kThreads = Config::kWarps * 32;

  // Scores: queries x keys.
  static constexpr int kScoreRowWarps = Config::kScoreRowWarps;
  static constexpr int kScoreColumnWarps = Config::kWarps / kScoreRowWarps;
  // dk and dv: keys x head dim.
  static constexpr int kKeyRowWarps = Config::kKeyRowWarps;
  static constexpr int kKeyColumnWarps = Config::kWarps / kKeyRowWarps;
  // dq: queries x head dim.
  static constexpr int kQueryRowWarps = Config::kQueryRowWarps;
  static constexpr int kQueryColumnWarps = Config::kWarps / kQueryRowWarps;

  static __device__ constexpr int blocks(int extent, int warps) {
    return (extent + 16 * warps - 1) / (16 * warps);
  }
  using Scores = tile::Accumulator<Config::kTileQ / (16 * kScoreRowWarps),
                                   Config::kTileK / (16 * kScoreColumnWarps)>;
  using KeyGradient = tile::Accumulator<Config::kTileK / (16 * kKeyRowWarps),
                                        blocks(Config::kHeadDim, kKeyColumnWarps)>;
  using QueryGradient = tile::Accumulator<Config::kTileQ / (16 * kQueryRowWarps),
                                          blocks(Config::kHeadDim, kQueryColumnWarps)>;
  static_assert(Config::kTileQ % (16 * kScoreRowWarps) == 0 &&
                    Config::kTileK % (16 * kScoreColumnWarps) == 0 &&
                    Config::kTileK % (16 * kKeyRowWarps) == 0 &&
                    Config::kTileQ % (16 * kQueryRowWarps) == 0,
                "warps take whole 16-row and 16-column blocks");
  static_assert(kWorkspaceRowMultiple % Config::kTileQ == 0 && Config::kTileQ >= kSmallestQueryTile,
                "the workspace is padded to whole query tiles");
  static_assert(kScoreColumnWarps <= 4 && kKeyColumnWarps <= 4 && kQueryColumnWarps <= 4,
                "LaneView steps over at most four 16-column blocks");

  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kQuerySteps = Config::kTileQ / 16;
  static constexpr int kKeySteps = Config::kTileK / 16;

  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<Config::kTileK, Config::kHeadDim>;
  using ScoreTile = tile::SharedTile<Config::kTileQ, Config::kTileK>;
  using Layout = attention::ScoreLayout<16 * kScoreRowWarps, 16 * kScoreColumnWarps>;

  static constexpr int kStages = Config::kStages;
  static constexpr int kStatisticsBytes = Config::kTileQ * 4;
  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kQueryOffset = kValueOffset + KeyTile::kBytes;
  static constexpr int kDoutOffset = kQueryOffset + kStages * QueryTile::kBytes;
  static constexpr int kProbsOffset = kDoutOffset + kStages * QueryTile::kBytes;
  static constexpr int kDscoresOffset = kProbsOffset + ScoreTile::kBytes;
  static constexpr int kLseOffset = kDscoresOffset + ScoreTile::kBytes;
  static constexpr int kDeltaOffset = kLseOffset + kStages * kStatisticsBytes;
  static constexpr int kSharedBytes = kDeltaOffset + kStages * kStatisticsBytes;
};

// One step of a CTA's walk: a query tile of a query head.
struct BackwardStep {
  int head;
  int query_tile;
};

// Where the operands of a step lie in shared memory.
template <class Config>
struct BackwardStage {
  using Shapes = BackwardShapes<Config>;
  unsigned origin;  // q lies kQueryOffset and dout kDoutOffset bytes behind it
  int index;

  __device__ __forceinline__ BackwardStage(unsigned shared, int stage)
      : origin(shared + stage * Shapes::QueryTile::kBytes), index(stage) {}

  __device__ __forceinline__ const float* lse(const unsigned char* shared) const {
    return reinterpret_cast<const float*>(shared + Shapes::kLseOffset +
                                          index * Shapes::kStatisticsBytes);
  }
  __device__ __forceinline__ const float* delta(const unsigned char* shared) const {
    return reinterpret_cast<const float*>(shared + Shapes::kDeltaOffset +
                                          index * Shapes::kStatisticsBytes);
  }
};

// q and dout of the CTA's batch: what a step's addresses start from.
struct BackwardInputs {
  const unsigned short* q;
  const unsigned short* dout;
};

template <class Config>
__device__ __forceinline__ void load_step_async(const BackwardParams& params,
                                                const BackwardInputs& inputs, int batch,
                                                const BackwardStep& step, unsigned shared,
                                                const BackwardStage<Config>& stage) {
  using Shapes = BackwardShapes<Config>;
  using QueryTile = typename Shapes::QueryTile;
  const int first_query = step.query_tile * Config::kTileQ;
  const auto load = [&](int tile_offset, const unsigned short* batch_start,
                        const TensorView& view) {
    tile::load_rows_async<QueryTile, Config::kHeadDim, Shapes::kThreads>(
        stage.origin, tile_offset,
        batch_start + static_cast<long long>(step.head) * view.head_stride, view.row_stride,
        first_query, params.attention.seqlen_q);
  };
  load(Shapes::kQueryOffset, inputs.q, params.attention.q);
  load(Shapes::kDoutOffset, inputs.dout, params.dout);
  // Row statistics are padded to whole tiles in the workspace: no bound to check.
  constexpr int kChunks = Shapes::kStatisticsBytes / 16;
  if (threadIdx.x < 2 * kChunks) {
    const bool is_delta = threadIdx.x >= kChunks;
    const int chunk = threadIdx.x % kChunks;
    const long long row = attention::workspace_row(params, batch, step.head, first_query);
    ptx::cp_async_16(shared + (is_delta ? Shapes::kDeltaOffset : Shapes::kLseOffset) +
                         stage.index * Shapes::kStatisticsBytes + chunk * 16,
                     (is_delta ? params.delta : params.lse_log2) + row + chunk * 4, true);
  }
  ptx::cp_async_commit();
}

// scores -> probs = 2^(score - lse), in place.
template <class Config, class Scores, class Layout>
__device__ __forceinline__ void exponentiate(Scores& scores, const Layout& layout, int first_query,
                                             const float* lse, float exponent_scale) {
#pragma unroll
  for (int m = 0; m < Scores::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float row_lse = lse[layout.query(m, 0, 2 * half) - first_query];
#pragma unroll
      for (int n = 0; n < Scores::kColumnTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& value = scores.values[m][n][2 * half + c];
          value = ptx::exp2_approx(fmaf(value, exponent_scale, -row_lse));
        }
    }
}

// dprobs -> dscores = probs (dprobs - delta), in place, with the derivatives of dropout and
// softcap. A dropped probability comes with its sign bit set.
template <class Config, class Scores, class Layout>
__device__ __forceinline__ void differentiate_softmax(
    Scores& dprobs, const Scores& probs, const Layout& layout, int first_query, const float* delta,
    const float* lse, const attention::ScoreTransform<Config>& transform, float dropout_scale) {
#pragma unroll
  for (int m = 0; m < Scores::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = layout.query(m, 0, 2 * half);
      const float row_delta = delta[query - first_query];
#pragma unroll
      for (int n = 0; n < Scores::kColumnTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int i = 2 * half + c;
          float prob = probs.values[m][n][i];
          float& value = dprobs.values[m][n][i];
          if constexpr (Config::kDropout) {
            value = __float_as_uint(prob) >> 31 ? 0.0f : value * dropout_scale;
            prob = fabsf(prob);
          }
          value = transform.dscore(prob, value, row_delta, lse[query - first_query], query,
                                   layout.key(m, n, i));
        }
    }
}

template <class Config, class Scores, class Layout>
__device__ __forceinline__ void mark_dropped(Scores& probs, const attention::Dropout& dropout,
                                             const Layout& layout) {
  dropout.for_each<Scores>(layout, [&](int m, int n, int i, bool kept) {
    if (!kept) probs.values[m][n][i] = -probs.values[m][n][i];
  });
}

// The probabilities that reach out: dropped ones become 0. Returns them for storing.
template <class Config, class Scores>
__device__ __forceinline__ Scores kept_probs(const Scores& probs) {
  Scores kept = probs;
  if constexpr (Config::kDropout) {
#pragma unroll
    for (int m = 0; m < Scores::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < Scores::kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& prob = kept.values[m][n][i];
          if (__float_as_uint(prob) >> 31) prob = 0.0f;
        }
  }
  return kept;
}

// Waits until all CTAs of smaller key tiles have added to this query tile.
__device__ __forceinline__ void wait_for_turn(const int* turn, int mine) {
  if (threadIdx.x == 0) {
    while (ptx::load_acquire(turn) != mine) {
    }
  }
  __syncthreads();  // no thread adds before thread 0 has seen the turn
}

__device__ __forceinline__ void pass_turn(int* turn, int next) {
  __threadfence();  // this thread's additions come before the turn is passed
  __syncthreads();  // and so do everyone else's
  if (threadIdx.x == 0) ptx::store_release(turn, next);
}

// Rounds dk or dv to 16 bits through shared memory.
// Needs: a barrier since the last use of `staging`, and another before it is used again.
template <class Config, class Gradient>
__device__ __forceinline__ void write_key_gradient(const TensorView& view, int batch, int head_k,
                                                   int first_key, int seqlen_k,
                                                   unsigned char* staging,
                                                   const Gradient& gradient) {
  using Shapes = BackwardShapes<Config>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  tile::store_accumulator<typename Config::Element, typename Shapes::KeyTile,
                          16 * Shapes::kKeyRowWarps, Shapes::kKeyColumnWarps>(
      tile::shared_address(staging), 0, gradient, warp % Shapes::kKeyRowWarps * 16,
      warp / Shapes::kKeyRowWarps);
  __syncthreads();  // store_rows reads what other warps staged
  tile::store_rows<typename Shapes::KeyTile, Config::kHeadDim, Shapes::kThreads>(
      staging, attention::head_address(view, batch, head_k), view.row_stride, first_key, seqlen_k);
}

template <class Config>
__device__ __forceinline__ void backward(const BackwardParams& params, unsigned char* shared) {
  using Shapes = BackwardShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  using ScoreTile = typename Shapes::ScoreTile;
  const AttentionParams& attention = params.attention;

  const int key_tiles = (attention.seqlen_k + Config::kTileK - 1) / Config::kTileK;
  const attention::GridPlace place(key_tiles, attention.heads_k);
  const int first_key = place.tile * Config::kTileK;
  const attention::VisibleRange<Config> range(attention);
  const attention::Range all_tiles = range.query_tiles(first_key);
  const attention::Range query_tiles =
      attention::own_query_tiles<Config>(attention, place.head, all_tiles);
  const int first_head = attention::first_query_head(attention, place.head);
  const int end_head =
      query_tiles.empty() ? first_head : first_head + attention::group_heads<Config>(attention);
  const auto next_step = [&](const BackwardStep& step) {
    // A part of a head has no next one; others begin with the first tile, which takes no register
    // where that is 0.
    return step.query_tile + 1 < query_tiles.end ? BackwardStep{step.head, step.query_tile + 1}
                                                 : BackwardStep{step.head + 1, all_tiles.begin};
  };
  BackwardStep step{first_head, query_tiles.begin};

  const unsigned shared_base = tile::shared_address(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int score_row = warp % Shapes::kScoreRowWarps * 16;
  const int score_column = warp / Shapes::kScoreRowWarps;
  const int key_row = warp % Shapes::kKeyRowWarps;
  const int key_column = warp / Shapes::kKeyRowWarps;
  const int query_row = warp % Shapes::kQueryRowWarps * 16;
  const int query_column = warp / Shapes::kQueryRowWarps;

  const BackwardInputs inputs{attention::head_address(attention.q, place.batch, 0),
                              attention::head_address(params.dout, place.batch, 0)};
  if (step.head < end_head) {
    const int key_head = attention::own_key_head(params, place.head);
    const auto load_keys = [&](const TensorView& view, int offset) {
      tile::load_rows_async<KeyTile, Config::kHeadDim, Shapes::kThreads>(
          shared_base, offset, attention::head_address(view, place.batch, key_head),
          view.row_stride, first_key, attention.seqlen_k);
    };
    load_keys(attention.k, Shapes::kKeyOffset);
    load_keys(attention.v, Shapes::kValueOffset);
    load_step_async<Config>(params, inputs, place.batch, step, shared_base,
                            BackwardStage<Config>(shared_base, 0));
  }

  typename Shapes::KeyGradient dk;
  typename Shapes::KeyGradient dv;
  dk.clear();
  dv.clear();

  const tile::TransposedOperand<KeyTile, 16 * Shapes::kScoreColumnWarps> k_rows{
      {shared_base, Shapes::kKeyOffset, score_column * 16}};
  const tile::TransposedOperand<KeyTile, 16 * Shapes::kScoreColumnWarps> v_rows{
      {shared_base, Shapes::kValueOffset, score_column * 16}};
  const tile::StraightOperand<KeyTile, Shapes::kQueryColumnWarps> k_columns{
      {shared_base, Shapes::kKeyOffset, 0, query_column}};
  const tile::ColumnOperand<ScoreTile, Shapes::kKeyRowWarps> probs_columns{
      {shared_base, Shapes::kProbsOffset, 0, key_row}};
  const tile::ColumnOperand<ScoreTile, Shapes::kKeyRowWarps> dscores_columns{
      {shared_base, Shapes::kDscoresOffset, 0, key_row}};
  const tile::RowOperand<ScoreTile, 16 * Shapes::kQueryRowWarps> dscores_rows{
      {shared_base, Shapes::kDscoresOffset, query_row}};

  int stage_index = 0;
#pragma unroll 1
  while (step.head < end_head) {
    const BackwardStage<Config> stage(shared_base, stage_index);
    const BackwardStep next = next_step(step);
    if constexpr (Shapes::kStages == 2) stage_index ^= 1;
    const int first_query = step.query_tile * Config::kTileQ;
    ptx::cp_async_wait<0>();
    __syncthreads();  // operands landed
    if (Shapes::kStages == 2 && next.head < end_head) {
      load_step_async<Config>(params, inputs, place.batch, next, shared_base,
                              BackwardStage<Config>(shared_base, stage_index));
    }

    const attention::ScoreTransform<Config> transform(attention, place.batch, step.head);
    const typename Shapes::Layout layout(first_query + score_row, first_key + score_column * 16);
    typename Shapes::Scores probs;
    probs.clear();
    tile::multiply_accumulate<Element, Shapes::kHeadDimSteps, Config::kScoreUnroll>(
        probs,
        tile::RowOperand<QueryTile, 16 * Shapes::kScoreRowWarps>{
            {stage.origin, Shapes::kQueryOffset, score_row}},
        k_rows);
    transform.apply(probs, layout);
    if (range.cuts(first_query, first_key)) {
      attention::mask_scores(probs, layout, attention::VisibleRange<Config>(attention));
    }
    exponentiate<Config>(probs, layout, first_query, stage.lse(shared), transform.exponent_scale);
    if constexpr (Config::kDropout) {
      mark_dropped<Config>(probs, attention::Dropout(attention, place.batch, step.head), layout);
    }
    typename Shapes::Scores dscores;
    dscores.clear();
    tile::multiply_accumulate<Element, Shapes::kHeadDimSteps, Config::kScoreUnroll>(
        dscores,
        tile::RowOperand<QueryTile, 16 * Shapes::kScoreRowWarps>{
            {stage.origin, Shapes::kDoutOffset, score_row}},
        v_rows);
    tile::store_accumulator<Element, ScoreTile, 16 * Shapes::kScoreRowWarps,
                            Shapes::kScoreColumnWarps>(
        shared_base, Shapes::kProbsOffset, kept_probs<Config>(probs), score_row, score_column);
    differentiate_softmax<Config>(dscores, probs, layout, first_query, stage.delta(shared),
                                  stage.lse(shared), transform, attention.dropout_scale);
    tile::store_accumulator<Element, ScoreTile, 16 * Shapes::kScoreRowWarps,
                            Shapes::kScoreColumnWarps>(shared_base, Shapes::kDscoresOffset, dscores,
                                                       score_row, score_column);
    __syncthreads();  // scores stored

    tile::multiply_accumulate<Element, Shapes::kQuerySteps>(
        dv, probs_columns,
        tile::StraightOperand<QueryTile, Shapes::kKeyColumnWarps>{
            {stage.origin, Shapes::kDoutOffset, 0, key_column}});
    typename Shapes::QueryGradient dq;
    dq.clear();
    tile::multiply_accumulate<Element, Shapes::kKeySteps>(dq, dscores_rows, k_columns);
    const long long row = attention::workspace_row(params, place.batch, step.head, first_query);
    const tile::GlobalAccumulator<Shapes::kThreads> accumulator{params.dq_accum +
                                                                row * params.padded_columns};
    if constexpr (Config::kDeterministic) {
      int* turn = params.turns + row / kSmallestQueryTile;
      const int mine = place.tile - range.key_tiles(first_query).begin;
      wait_for_turn(turn, mine);
      accumulator.add(dq);
      pass_turn(turn, mine + 1);
    } else {
      accumulator.add(dq);
    }
    tile::multiply_accumulate<Element, Shapes::kQuerySteps>(
        dk, dscores_columns,
        tile::StraightOperand<QueryTile, Shapes::kKeyColumnWarps>{
            {stage.origin, Shapes::kQueryOffset, 0, key_column}});
    if (Shapes::kStages == 1) {
      __syncthreads();  // operands free
      if (next.head < end_head) {
        load_step_async<Config>(params, inputs, place.batch, next, shared_base, stage);
      }
    }
    step = next;
  }

  // All warps are done with k and v, whose memory stages dk and dv.
  const bool spoilt = attention::barrier_any_spoilt<Config>(!dk.is_finite() || !dv.is_finite());
  dk.scale(attention.softmax_scale);
  if constexpr (Config::kDropout) dv.scale(attention.dropout_scale);
  write_key_gradient<Config>(params.dk, place.batch, place.head, first_key, attention.seqlen_k,
                             shared + Shapes::kKeyOffset, dk);
  write_key_gradient<Config>(params.dv, place.batch, place.head, first_key, attention.seqlen_k,
                             shared + Shapes::kValueOffset, dv);
  if (spoilt && threadIdx.x == 0) {
    // Worked out anew: kept, it would take a register from the loop above.
    params.spoilt[place.batch * attention.heads +
                  attention::first_query_head(attention, place.head)] = 1;
  }
}

// dq = scale * its fp32 sums, rounded. One CTA serves one query tile of one head, with the warp
// layout that the main kernel added with. The main kernel has no register to spare: it leaves to
// this one what keeps its dk and dv contained, too.
template <class Config>
__device__ __forceinline__ void backward_postprocess(const BackwardParams& params,
                                                     unsigned char* shared) {
  using Shapes = BackwardShapes<Config>;
  const AttentionParams& attention = params.attention;
  const int query_tiles = (attention.seqlen_q + Config::kTileQ - 1) / Config::kTileQ;
  const attention::GridPlace place(query_tiles, attention.heads);
  const int first_query = place.tile * Config::kTileQ;
  const int warp = static_cast<int>(threadIdx.x) / 32;

  const long long row = attention::workspace_row(params, place.batch, place.head, first_query);
  const tile::GlobalAccumulator<Shapes::kThreads> accumulator{params.dq_accum +
                                                              row * params.padded_columns};
  typename Shapes::QueryGradient dq;
  accumulator.load(dq);
  dq.scale(attention.softmax_scale);
  tile::store_accumulator<typename Config::Element, typename Shapes::QueryTile,
                          16 * Shapes::kQueryRowWarps, Shapes::kQueryColumnWarps>(
      tile::shared_address(shared), 0, dq, warp % Shapes::kQueryRowWarps * 16,
      warp / Shapes::kQueryRowWarps);
  // store_rows reads what other warps staged
  const bool spoilt = attention::barrier_any_spoilt<Config>(!dq.is_finite());
  tile::store_rows<typename Shapes::QueryTile, Config::kHeadDim, Shapes::kThreads>(
      shared, attention::head_address(params.dq, place.batch, place.head), params.dq.row_stride,
      first_query, attention.seqlen_q);
  attention::contain_gradients<Config>(params, place, spoilt, Config::kWarps);
}

}  // namespace jfa::sm80
