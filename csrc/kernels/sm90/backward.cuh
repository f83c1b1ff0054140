// Backward attention on Hopper. With scores = scale q k^T, probs = exp(scores - lse) and
// dprobs = dout v^T, for every visible pair of a query tile and a key tile:
//
//   dv += probs^T dout      dscores = probs (dprobs - delta)
//   dk += scale dscores^T q     dq += scale dscores k
//
// One CTA owns one key tile of one key head and walks the query tiles of all query heads of its
// group. One warp (the producer) keeps the copy engine busy; two warpgroups (consumers) own 64 keys
// each. They compute scores^T and dprobs^T, rows being keys, so that probs^T and dscores^T feed dv
// and dk from registers; only dscores goes to shared memory, for dq, of which each consumer has a
// part of the columns. dq gathers in fp32 in global memory (tile/bulk_accumulator.cuh).
//
//   ring    stages        filled with                released
//   keys    1             k and v of the key tile    never
//   query   kQueryStages  q and lse of a query tile  by each consumer's warps, after dk
//   dout    kDoutStages   dout and delta             by each consumer's warps, after dv
//
//   barrier  threads               what it orders
//   1, 2     both consumers (256)  the turns of consumer 0 and of consumer 1; at the end of 2, that
//                                  consumer 0 is done with k, whose place dk of consumer 1 takes
//   3        consumer 0 (128)      in the end, that it is done with k, whose place dk takes
//
// In its turn a consumer starts dv, dk and dq of a step, then scores and dprobs of the next, and
// passes the turn on; its exponentials run while the other has its turn. A turn that comes says
// besides that the other consumer has stored its dscores, of this step for consumer 1 and of the
// step before for consumer 0, whose dq therefore lags by one, and that it has read those of the
// step before that, whose place is written next. Two stages of dscores suffice.
#pragma once

#include <attention/containment.cuh>
#include <attention/dropout.cuh>
#include <attention/head_address.cuh>
#include <attention/score_layout.cuh>
#include <attention/score_transform.cuh>
#include <attention/visible_range.cuh>
#include <params/backward_params.h>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <tile/bulk_accumulator.cuh>
#include <tile/copy.cuh>
#include <tile/descriptor.cuh>
#include <tile/ring.cuh>

namespace jfa::sm90 {

constexpr int kBackwardConsumers = 2;
constexpr int kBackwardThreads = (kBackwardConsumers + 1) * 128;
constexpr int kBackwardConsumerRegisters = 240;
constexpr int kBackwardProducerRegisters = 24;
constexpr int kTurnBarrier = 1;  // and 2
constexpr int kEndBarrier = 3;

template <class Config>
struct BackwardShapes {
  static_assert(!Config::kSoftcap, "its derivative needs registers that are taken");
  static_assert(Config::kTileK == 64 * kBackwardConsumers, "a consumer owns 64 keys");
  static_assert(Config::kTileQ == 64, "dq is one product of 64 rows");
  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kQuerySteps = Config::kTileQ / 16;
  static constexpr int kKeySteps = Config::kTileK / 16;

  // The columns of dq that a consumer computes start in a panel, or halfway through it.
  static constexpr int kSplitSteps = Config::kHeadDim > 64 ? 4 : 2;
  static __device__ constexpr int query_gradient_steps(int consumer) {
    return consumer == 0 ? (kHeadDimSteps < kSplitSteps ? kHeadDimSteps : kSplitSteps)
                         : (kHeadDimSteps > kSplitSteps ? kHeadDimSteps - kSplitSteps : 0);
  }
  // Where a consumer's part of dq starts, in floats.
  static __device__ constexpr int query_gradient_offset(int consumer) {
    return consumer * Config::kTileQ * 16 * kSplitSteps;
  }
  static constexpr int kSplitBytes =
      Config::kHeadDim > 64 ? Config::kTileK * tile::kPanelRowBytes : 64;

  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<Config::kTileK, Config::kHeadDim>;
  using DscoresTile = tile::SharedTile<Config::kTileQ, Config::kTileK>;
  using Scores = tile::Accumulator<1, kQuerySteps>;
  using Probs = tile::RegisterOperand<1, kQuerySteps>;
  using KeyGradient = tile::Accumulator<1, kHeadDimSteps>;
  template <int kConsumer>
  using QueryGradient =
      tile::Accumulator<1,
                        query_gradient_steps(kConsumer) == 0 ? 1 : query_gradient_steps(kConsumer)>;

  using QueryRing = tile::Ring<Config::kQueryStages>;
  using DoutRing = tile::Ring<Config::kDoutStages>;
  using KeyRing = tile::Ring<1>;
  using QueryPosition = tile::RingPosition<Config::kQueryStages>;
  using DoutPosition = tile::RingPosition<Config::kDoutStages>;
  static constexpr int kStatisticsBytes = Config::kTileQ * 4;

  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kQueryOffset = kValueOffset + KeyTile::kBytes;
  static constexpr int kDoutOffset = kQueryOffset + Config::kQueryStages * QueryTile::kBytes;
  static constexpr int kDscoresOffset = kDoutOffset + Config::kDoutStages * QueryTile::kBytes;
  static constexpr int kQueryGradientOffset = kDscoresOffset + 2 * DscoresTile::kBytes;
  static constexpr int kLseOffset =
      kQueryGradientOffset + Config::kTileQ * 16 * kHeadDimSteps * static_cast<int>(sizeof(float));
  static constexpr int kDeltaOffset = kLseOffset + Config::kQueryStages * kStatisticsBytes;
  static constexpr int kQueryRingOffset = kDeltaOffset + Config::kDoutStages * kStatisticsBytes;
  static constexpr int kDoutRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kKeyRingOffset = kDoutRingOffset + DoutRing::kBytes;
  static constexpr int kSharedBytes = kKeyRingOffset + KeyRing::kBytes;
};

template <class Config>
struct BackwardStages {
  using Shapes = BackwardShapes<Config>;
  unsigned shared;
  typename Shapes::QueryRing query;
  typename Shapes::DoutRing dout;
  typename Shapes::KeyRing keys;

  __device__ __forceinline__ explicit BackwardStages(unsigned shared_address)
      : shared(shared_address),
        query{shared_address + Shapes::kQueryRingOffset},
        dout{shared_address + Shapes::kDoutRingOffset},
        keys{shared_address + Shapes::kKeyRingOffset} {}
};

// A CTA's walk: all query tiles that see its keys, for each query head of its group.
template <class Config>
struct BackwardWalk {
  attention::GridPlace place;  // head is the key head
  int group;
  int first_key;
  attention::Range query_tiles;

  __device__ __forceinline__ explicit BackwardWalk(const AttentionParams& attention)
      : place((attention.seqlen_k + Config::kTileK - 1) / Config::kTileK, attention.heads_k),
        group(attention.heads / attention.heads_k),
        first_key(place.tile * Config::kTileK),
        query_tiles(attention::VisibleRange<Config>(attention).query_tiles(first_key)) {}

  __device__ __forceinline__ int steps() const {
    return query_tiles.empty() ? 0 : group * (query_tiles.end - query_tiles.begin);
  }

  // One step of the walk.
  struct Step {
    int head;
    int query_tile;
  };
  __device__ __forceinline__ Step first() const { return {place.head * group, first_tile()}; }
  __device__ __forceinline__ void advance(Step& step) const {
    if (++step.query_tile == query_tiles.end) step.query_tile = query_tiles.begin;
    if (step.query_tile == first_tile()) ++step.head;
  }
  // CTAs side by side start apart, as a causal mask would have it: additions to one dq tile at one
  // time wait for each other (3 to 6% without a mask on an H100).
  __device__ __forceinline__ int first_tile() const {
    if constexpr (Config::kWindowed) return query_tiles.begin;
    return first_key / Config::kTileQ % query_tiles.end;
  }
};

template <class Tile>
__device__ __forceinline__ void load_panels(unsigned shared, const TensorMap& map, unsigned barrier,
                                            int row, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    ptx::tma_load(shared + panel * Tile::kPanelBytes, map, barrier, ptx::kEvictLast,
                  panel * tile::kPanelColumns, row, head, batch);
}

// Threads: one.
template <class Config>
__device__ __forceinline__ void produce_backward(const Sm90BackwardParams& params,
                                                 const BackwardStages<Config>& stages) {
  using Shapes = BackwardShapes<Config>;
  using KeyTile = typename Shapes::KeyTile;
  using QueryTile = typename Shapes::QueryTile;
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;
  const BackwardWalk<Config> walk(attention);
  const int batch = walk.place.batch;

  // A query tile of q or dout, and its lse or delta.
  const auto load = [&](const auto& ring, auto& at, int tile_offset, int statistics_offset,
                        const TensorMap& map, int batches, const float* statistics,
                        const typename BackwardWalk<Config>::Step& step) {
    const int first_query = step.query_tile * Config::kTileQ;
    const unsigned barrier = ring.full(at.stage());
    ring.begin_fill(at, QueryTile::kBytes + Shapes::kStatisticsBytes);
    load_panels<QueryTile>(stages.shared + tile_offset + at.stage() * QueryTile::kBytes, map,
                           barrier, first_query, step.head, batch % batches);
    ptx::bulk_load(stages.shared + statistics_offset + at.stage() * Shapes::kStatisticsBytes,
                   statistics + attention::workspace_row(backward, batch, step.head, first_query),
                   Shapes::kStatisticsBytes, barrier);
    at.advance();
  };
  const auto load_query = [&](typename Shapes::QueryPosition& at, const auto& step) {
    load(stages.query, at, Shapes::kQueryOffset, Shapes::kLseOffset, params.q, attention.q.batches,
         backward.lse_log2, step);
  };
  const auto load_dout = [&](typename Shapes::DoutPosition& at, const auto& step) {
    load(stages.dout, at, Shapes::kDoutOffset, Shapes::kDeltaOffset, params.dout,
         backward.dout.batches, backward.delta, step);
  };

  int remaining = walk.steps();
  if (remaining == 0) return;
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;
  typename BackwardWalk<Config>::Step step = walk.first();
  load_query(query_at, step);
  const unsigned barrier = stages.keys.full(0);
  ptx::mbarrier_arrive_expect(barrier, 2 * KeyTile::kBytes);
  load_panels<KeyTile>(stages.shared + Shapes::kKeyOffset, params.k, barrier, walk.first_key,
                       walk.place.head, batch % attention.k.batches);
  load_panels<KeyTile>(stages.shared + Shapes::kValueOffset, params.v, barrier, walk.first_key,
                       walk.place.head, batch % attention.v.batches);
  // Consumers want the next step's q before this step's dq.
#pragma unroll 1
  while (true) {
    load_dout(dout_at, step);
    if (--remaining == 0) break;
    walk.advance(step);
    load_query(query_at, step);
  }
}

// Which elements of a thread's share of scores^T dropout keeps.
template <class Config, class Scores>
struct KeptBits {
  static_assert(Scores::kColumnTiles * 4 <= 32, "one bit for each element");
  unsigned bits = ~0u;

  template <class Layout>
  __device__ __forceinline__ void draw(const AttentionParams& params, int batch, int head,
                                       const Layout& layout) {
    if constexpr (Config::kDropout) {
      bits = ~0u;
      const attention::Dropout dropout(params, batch, head);
#pragma unroll
      for (int pair = 0; pair < Scores::kColumnPairs; ++pair)
        dropout.for_pair(layout, 0, pair, [&](int side, int i, bool kept) {
          if (!kept) bits &= ~(1u << (4 * (2 * pair + side) + i));
        });
    }
  }

  __device__ __forceinline__ bool kept(int n, int i) const {
    return !Config::kDropout || (bits >> (4 * n + i)) % 2 == 1;
  }
};

// The value for each column of an accumulator, from a vector in shared memory.
__device__ __forceinline__ float2 column_pair(const float* vector, int n) {
  return *reinterpret_cast<const float2*>(vector + n * 8 + ptx::reread_lane() % 4 * 2);
}

// Rounds dk or dv and sends it off through the place of the warp's own rows of k or v.
// Threads: a whole warp.
template <class Config, class Gradient>
__device__ __forceinline__ void store_key_gradient(const TensorMap& map, unsigned staging,
                                                   const Gradient& gradient, int warp_row,
                                                   int first_key, int head_k, int batch) {
  using KeyTile = typename BackwardShapes<Config>::KeyTile;
  tile::store_accumulator<typename Config::Element, KeyTile, 16, 1>(staging, 0, gradient, warp_row,
                                                                    0);
  ptx::fence_async_proxy();
  __syncwarp();  // all lanes have staged their part of the warp's rows
  if (ptx::elect_lane()) {
#pragma unroll
    for (int panel = 0; panel < KeyTile::kPanels; ++panel)
      ptx::tma_store(map, staging + panel * KeyTile::kPanelBytes + warp_row * tile::kPanelRowBytes,
                     panel * tile::kPanelColumns, first_key + warp_row, head_k, batch);
    ptx::bulk_commit();
  }
}

// Threads: a whole warpgroup.
template <class Config, int kConsumer>
__device__ __forceinline__ void consume_backward(const Sm90BackwardParams& params,
                                                 const BackwardStages<Config>& stages,
                                                 unsigned char* shared) {
  using Shapes = BackwardShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  using DscoresTile = typename Shapes::DscoresTile;
  using Scores = typename Shapes::Scores;
  using Step = typename BackwardWalk<Config>::Step;
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;
  const BackwardWalk<Config> walk(attention);
  const int batch = walk.place.batch;

  constexpr int kFirstRow = kConsumer * 64;
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32);
  const int warp_row = kFirstRow + warp * 16;

  const tile::RowDescriptor<KeyTile> k_rows(stages.shared + Shapes::kKeyOffset, kFirstRow);
  const tile::RowDescriptor<KeyTile> v_rows(stages.shared + Shapes::kValueOffset, kFirstRow);
  const tile::RowDescriptor<QueryTile> q_rows(stages.shared + Shapes::kQueryOffset, 0);
  const tile::RowDescriptor<QueryTile> dout_rows(stages.shared + Shapes::kDoutOffset, 0);
  const tile::ColumnDescriptor<QueryTile> q_columns(stages.shared + Shapes::kQueryOffset);
  const tile::ColumnDescriptor<QueryTile> dout_columns(stages.shared + Shapes::kDoutOffset);
  const tile::RowDescriptor<DscoresTile> dscores_rows(stages.shared + Shapes::kDscoresOffset, 0);
  const tile::ColumnDescriptor<KeyTile> k_columns(stages.shared + Shapes::kKeyOffset +
                                                  kConsumer * Shapes::kSplitBytes);

  typename Shapes::KeyGradient dk;
  typename Shapes::KeyGradient dv;
  dk.clear();
  dv.clear();
  Scores scores;
  Scores dprobs;
  KeptBits<Config, Scores> dropout;
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;
  int dscores_stage = 0;

  const auto start_scores = [&] {
    tile::start_row_product<Element, Shapes::kHeadDimSteps>(scores, k_rows, 0, q_rows,
                                                            query_at.stage() * QueryTile::kBytes);
  };
  const auto statistics = [&](int offset, int stage) {
    return reinterpret_cast<const float*>(shared + offset + stage * Shapes::kStatisticsBytes);
  };
  // From the finished products of a step to probabilities.
  const auto make_probs = [&](const Step& step) {
    const int first_query = step.query_tile * Config::kTileQ;
    const attention::ScoreTransform<Config> transform(attention, batch, step.head);
    const attention::TransposedScoreLayout layout(first_query, walk.first_key + warp_row);
    const float* const lse = statistics(Shapes::kLseOffset, query_at.stage());
    transform.apply(scores, layout);
    const attention::VisibleRange<Config> range(attention);
    if (__builtin_expect(range.cuts(first_query, walk.first_key), false))
      attention::mask_scores(scores, layout, range);
#pragma unroll
    for (int n = 0; n < Scores::kColumnTiles; ++n) {
      const float2 column_lse = column_pair(lse, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = scores.values[0][n][i];
        value = transform.prob(value, i % 2 == 0 ? column_lse.x : column_lse.y);
      }
    }
    dropout.draw(attention, batch, step.head, layout);
  };
  const auto round_probs = [&](typename Shapes::Probs& rounded) {
#pragma unroll
    for (int part = 0; part < Shapes::kQuerySteps; ++part) {
      float kept[2][4];
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          kept[side][i] =
              dropout.kept(2 * part + side, i) ? scores.values[0][2 * part + side][i] : 0.0f;
      rounded.template pack_step<Element>(0, part, kept[0], kept[1]);
    }
  };
  // dprobs become dscores.
  const auto make_dscores = [&](const Step& step) {
    const int first_query = step.query_tile * Config::kTileQ;
    const attention::ScoreTransform<Config> transform(attention, batch, step.head);
    const attention::TransposedScoreLayout layout(first_query, walk.first_key + warp_row);
    const float* const delta = statistics(Shapes::kDeltaOffset, dout_at.stage());
#pragma unroll
    for (int n = 0; n < Scores::kColumnTiles; ++n) {
      const float2 column_delta = column_pair(delta, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = dprobs.values[0][n][i];
        if constexpr (Config::kDropout)
          value = dropout.kept(n, i) ? value * attention.dropout_scale : 0.0f;
        value = transform.dscore(scores.values[0][n][i], value,
                                 i % 2 == 0 ? column_delta.x : column_delta.y, /*lse_log2=*/0.0f,
                                 layout.query(0, n, i), layout.key(0, n, i));
      }
    }
  };

  const auto start_dprobs = [&] {
    tile::start_row_product<Element, Shapes::kHeadDimSteps>(dprobs, v_rows, 0, dout_rows,
                                                            dout_at.stage() * QueryTile::kBytes);
  };
  // dq of the step whose dscores lie in a stage, and the addition of it once it has come.
  typename Shapes::template QueryGradient<kConsumer> dq;
  const auto start_query_gradient = [&](int stage) {
    if constexpr (Shapes::query_gradient_steps(kConsumer) > 0) {
      tile::start_shared_product<Element, Shapes::kKeySteps>(
          dq, dscores_rows, stage * DscoresTile::kBytes, k_columns, 0);
    } else {
      ptx::wgmma_commit();
    }
  };
  const auto add_query_gradient = [&](const Step& added) {
    if constexpr (Shapes::query_gradient_steps(kConsumer) > 0) {
      constexpr int kOffset = Shapes::query_gradient_offset(kConsumer);
      const long long row =
          attention::workspace_row(backward, batch, added.head, added.query_tile * Config::kTileQ);
      const tile::BulkAccumulator<decltype(dq)> accumulator{
          backward.dq_accum + row * backward.padded_columns + kOffset};
      accumulator.add(dq, shared + Shapes::kQueryGradientOffset + kOffset * 4);
    }
  };

  int remaining = walk.steps();
  const bool any_steps = remaining > 0;
  Step step{};
  Step before{-1, 0};  // head -1: the first step has none
  // The first consumer's dq lags a step behind: when its turn comes, the second one has not stored
  // its dscores.
  const auto finish_query_gradient = [&] {
    if constexpr (kConsumer == 1) {
      add_query_gradient(step);
    } else {
      if (before.head >= 0) add_query_gradient(before);
      before = step;
    }
  };
  if (remaining > 0) {
    step = walk.first();
    if constexpr (kConsumer == 1) ptx::barrier_arrive(kTurnBarrier, 256);  // the first turn
    ptx::mbarrier_wait(stages.keys.full(0), 0);
    stages.query.wait_full(query_at);
    start_scores();
    stages.dout.wait_full(dout_at);
    start_dprobs();
    ptx::wgmma_wait<1>();  // scores
    make_probs(step);
    ptx::wgmma_wait<0>();  // dprobs
  }
#pragma unroll 1
  while (remaining > 0) {
    typename Shapes::Probs rounded_probs;
    round_probs(rounded_probs);
    make_dscores(step);
    typename Shapes::Probs rounded_dscores;
    rounded_dscores.template pack<Element>(dprobs);
    tile::store_transposed<DscoresTile>(
        stages.shared + Shapes::kDscoresOffset + dscores_stage * DscoresTile::kBytes,
        rounded_dscores, kConsumer * 4 + warp);
    ptx::fence_async_proxy();

    ptx::barrier_sync(kTurnBarrier + kConsumer, 256);  // dscores are there, see the table above
    tile::start_register_product<Element>(dv, rounded_probs, dout_columns,
                                          dout_at.stage() * QueryTile::kBytes);
    tile::start_register_product<Element>(dk, rounded_dscores, q_columns,
                                          query_at.stage() * QueryTile::kBytes);
    start_query_gradient(kConsumer == 0 ? dscores_stage ^ 1 : dscores_stage);
    dscores_stage ^= 1;
    ptx::wgmma_wait<1>();  // dv and dk
    // Every thread has read lse and delta for itself.
    stages.dout.release(dout_at.stage());
    stages.query.release(query_at.stage());
    if (--remaining == 0) {
      ptx::wgmma_wait<0>();  // dq
      finish_query_gradient();
      ptx::barrier_arrive(kTurnBarrier + 1 - kConsumer, 256);
      break;
    }
    query_at.advance();
    dout_at.advance();
    stages.query.wait_full(query_at);
    start_scores();
    ptx::wgmma_wait<1>();  // dq
    finish_query_gradient();
    walk.advance(step);
    stages.dout.wait_full(dout_at);
    start_dprobs();
    ptx::barrier_arrive(kTurnBarrier + 1 - kConsumer, 256);
    ptx::wgmma_wait<1>();  // scores
    make_probs(step);
    ptx::wgmma_wait<0>();  // dprobs
  }
  if constexpr (kConsumer == 0) {
    if (before.head >= 0) {
      ptx::barrier_sync(kTurnBarrier, 256);
      start_query_gradient(dscores_stage ^ 1);
      ptx::wgmma_wait<0>();
      add_query_gradient(before);
      ptx::barrier_arrive(kTurnBarrier + 1, 256);
      ptx::barrier_sync(kEndBarrier, 128);
    }
  } else if (any_steps) {
    ptx::barrier_sync(kTurnBarrier + 1, 256);
  }

  const bool spoilt = !dk.is_finite() || !dv.is_finite();
  dk.scale(attention.softmax_scale);
  if constexpr (Config::kDropout) dv.scale(attention.dropout_scale);
  store_key_gradient<Config>(params.dk, stages.shared + Shapes::kKeyOffset, dk, warp_row,
                             walk.first_key, walk.place.head, batch);
  store_key_gradient<Config>(params.dv, stages.shared + Shapes::kValueOffset, dv, warp_row,
                             walk.first_key, walk.place.head, batch);
  if constexpr (Config::kWindowed) {
    if (spoilt) backward.spoilt[batch * attention.heads + walk.place.head * walk.group] = 1;
  }
  if (ptx::elect_lane()) ptx::bulk_wait();
}

template <class Config>
__device__ __forceinline__ void backward(const Sm90BackwardParams& params, unsigned char* shared) {
  const BackwardStages<Config> stages(tile::shared_address(shared));
  if (threadIdx.x == 0) {
    stages.query.init(kBackwardConsumers * 128);
    stages.dout.init(kBackwardConsumers * 128);
    stages.keys.init(1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 0) {
    ptx::release_registers<kBackwardProducerRegisters>();
    if (ptx::uniform(static_cast<int>(threadIdx.x) / 32) == 0 && ptx::elect_lane())
      produce_backward<Config>(params, stages);
  } else {
    ptx::claim_registers<kBackwardConsumerRegisters>();
    if (warpgroup == 1) {
      consume_backward<Config, 0>(params, stages, shared);
    } else {
      consume_backward<Config, 1>(params, stages, shared);
    }
  }
}

// dq = scale * its fp32 sums, rounded. One CTA serves one query tile of one head; its two halves
// read what the two consumers added.
template <class Config>
__device__ __forceinline__ void backward_postprocess(const BackwardParams& params,
                                                     unsigned char* shared) {
  using Shapes = BackwardShapes<Config>;
  using QueryTile = typename Shapes::QueryTile;
  constexpr int kThreads = kBackwardConsumers * 128;
  const AttentionParams& attention = params.attention;
  const int query_tiles = (attention.seqlen_q + Config::kTileQ - 1) / Config::kTileQ;
  const attention::GridPlace place(query_tiles, attention.heads);
  const int first_query = place.tile * Config::kTileQ;
  const long long row = attention::workspace_row(params, place.batch, place.head, first_query);
  float* const accumulated = params.dq_accum + row * params.padded_columns;
  const int warp_row = static_cast<int>(threadIdx.x) % 128 / 32 * 16;

  bool finite = true;
  const auto stage_part = [&](auto part, int offset, int first_column16) {
    const tile::BulkAccumulator<decltype(part)> accumulator{accumulated + offset};
    accumulator.load(part);
    part.scale(attention.softmax_scale);
    finite = part.is_finite();
    tile::store_accumulator<typename Config::Element, QueryTile, 16, 1>(
        tile::shared_address(shared), first_column16 / 4 * QueryTile::kPanelBytes, part, warp_row,
        first_column16 % 4);
  };
  if (threadIdx.x < 128) {
    stage_part(tile::Accumulator<1, Shapes::query_gradient_steps(0)>(), 0, 0);
  } else if constexpr (Shapes::query_gradient_steps(1) > 0) {
    stage_part(tile::Accumulator<1, Shapes::query_gradient_steps(1)>(),
               Shapes::query_gradient_offset(1), Shapes::kSplitSteps);
  }
  // store_rows reads what other warps staged
  const bool spoilt = attention::barrier_any_spoilt<Config>(!finite);
  tile::store_rows<QueryTile, Config::kHeadDim, kThreads>(
      shared, attention::head_address(params.dq, place.batch, place.head), params.dq.row_stride,
      first_query, attention.seqlen_q);
  attention::contain_gradients<Config>(params, place, spoilt, kThreads / 32);
}

}  // namespace jfa::sm90
