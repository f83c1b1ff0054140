// Backward attention on Hopper. With scores = scale q k^T, probs = exp(scores - lse) and
// dprobs = dout v^T, for every visible pair of a query tile and a key tile:
//
//   dv += probs^T dout      dscores = probs (dprobs - delta)
//   dk += scale dscores^T q     dq += scale dscores k
//
// One CTA owns one key tile of one key head and walks the query tiles of all query heads of its
// group. One warp (the producer) keeps the copy engine busy, which brings tiles and takes dq; two
// warpgroups (consumers) own 64 keys each. They compute scores^T and dprobs^T, rows being keys, so
// that probs^T and dscores^T feed dv and dk from registers; only dscores goes to shared memory, for
// dq, of which each consumer has a part of the columns, or with tiles of 128 queries half of the
// rows. dq gathers in fp32 in global memory (tile/bulk_accumulator.cuh). The three warps beside the
// producer prepare the rows of heads to come and round dq of heads that are done
// (sm90/row_service.cuh).
//
//   ring    stages        filled with                released
//   keys    2             k, and v, of the key tile  never
//   query   kQueryStages  q and lse of a query tile  by each consumer's threads, after dk
//   dout    kDoutStages   dout and delta             by each consumer's threads, after dv
//   sums    1, of each    a consumer's part of dq,   by the producer, when the part that comes
//           consumer      by all its threads         next has been sent
//
//   barrier  threads               what it orders
//   1, 2     both consumers (256)  the turns of consumer 0 and of consumer 1
//   3        service warps (96)    their writes before one of them tells other CTAs, what they
//                                  stage, and that one of them has heard of other CTAs
//
// In its turn a consumer starts dv, dq and dk of a step, then scores and dprobs of the next, and
// passes the turn on; its exponentials run while the other has its turn. What else it does in its
// turn, it does beside products that are queued: dq is staged beside dk, and the fence that dq
// needs before it is sent comes behind all turns but the last (docs/tuning.md has what a turn's
// parts take). A turn that comes says besides that the other consumer has stored its dscores, of
// this step for consumer 1 and of the step before for consumer 0, whose dq therefore lags by one,
// and that it has read the dscores whose place is written next. Two stages of dscores suffice.
#pragma once

#include <sm90/backward_steps.cuh>
#include <sm90/fused_place.cuh>
#include <sm90/row_service.cuh>

namespace jfa::sm90 {

constexpr int kTurnBarrier = 1;  // and 2

template <class Config>
struct BackwardShapes {
  static_assert(Config::kTileK == 64 * kBackwardConsumers, "a consumer owns 64 keys");
  // Of dq, a consumer computes half of the columns of 64 queries, or all columns of half of 128.
  static_assert(Config::kTileQ == 64 || Config::kTileQ == 128, "dq is a product of 64 rows");
  static_assert(Config::kQueryStages > 1 && Config::kDoutStages > 1,
                "in its turn a consumer waits for the next step, while the other needs this one");
  static constexpr bool kSplitsRows = Config::kTileQ == 128;
  // Scores of the next step are started before dq is staged where registers hold both beside dk and
  // dv; behind dq, they wait for its stores.
  static constexpr bool kScoresFirst = Config::kHeadDim <= 64;
  static constexpr int kConsumerRegisters = Config::kServesRows ? 232 : kBackwardConsumerRegisters;
  static constexpr int kProducerRegisters = Config::kServesRows ? 40 : kBackwardProducerRegisters;
  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kQuerySteps = Config::kTileQ / 16;
  static constexpr int kKeySteps = Config::kTileK / 16;

  // Where columns are split, a consumer's start in a panel, or halfway through it.
  static constexpr int kSplitSteps = Config::kHeadDim > 64 ? 4 : 2;
  static __device__ constexpr int query_gradient_steps(int consumer) {
    if (kSplitsRows) return kHeadDimSteps;
    return consumer == 0 ? (kHeadDimSteps < kSplitSteps ? kHeadDimSteps : kSplitSteps)
                         : (kHeadDimSteps > kSplitSteps ? kHeadDimSteps - kSplitSteps : 0);
  }
  // Where a consumer's part of dq starts, in floats.
  static __device__ constexpr int query_gradient_offset(int consumer) {
    return consumer * 64 * 16 * (kSplitsRows ? kHeadDimSteps : kSplitSteps);
  }
  // Where the sums of 16 rows by 16 columns of a tile's dq start, in floats.
  static __device__ __forceinline__ int query_gradient_place(int row_block, int step) {
    const int consumer = kSplitsRows ? row_block / 4 : step >= kSplitSteps;
    const int steps = consumer == 0 ? query_gradient_steps(0) : query_gradient_steps(1);
    const int part_step = kSplitsRows ? step : step - consumer * kSplitSteps;
    return query_gradient_offset(consumer) + (row_block % 4 * steps + part_step) * 256;
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
  using KeyRing = tile::Ring<2>;   // of k and of v: scores need not wait for v
  using SumsRing = tile::Ring<1>;  // one for each consumer
  using SumsPosition = tile::RingPosition<1>;
  static constexpr int kKeyStage = 0;
  static constexpr int kValueStage = 1;
  using QueryPosition = tile::RingPosition<Config::kQueryStages>;
  using DoutPosition = tile::RingPosition<Config::kDoutStages>;
  static constexpr int kStatisticsBytes = Config::kTileQ * 4;

  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kQueryOffset = kValueOffset + KeyTile::kBytes;
  static constexpr int kDoutOffset = kQueryOffset + Config::kQueryStages * QueryTile::kBytes;
  static constexpr int kDscoresOffset = kDoutOffset + Config::kDoutStages * QueryTile::kBytes;
  static constexpr int kQueryGradientOffset = kDscoresOffset + 2 * DscoresTile::kBytes;
  static constexpr int kQueryGradientBytes =
      Config::kTileQ * 16 * kHeadDimSteps * static_cast<int>(sizeof(float));
  static constexpr int kLseOffset = kQueryGradientOffset + kQueryGradientBytes;
  static constexpr int kDeltaOffset = kLseOffset + Config::kQueryStages * kStatisticsBytes;
  static constexpr int kQueryRingOffset = kDeltaOffset + Config::kDoutStages * kStatisticsBytes;
  static constexpr int kDoutRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kKeyRingOffset = kDoutRingOffset + DoutRing::kBytes;
  static constexpr int kSumsRingOffset = kKeyRingOffset + KeyRing::kBytes;
  static constexpr int kServiceOffset = kSumsRingOffset + kBackwardConsumers * SumsRing::kBytes;
  static_assert(kServiceOffset % 16 == 0, "rows are staged by 16 bytes");
};

// All of the shared memory, that of the service warps included.
template <class Config>
struct FusedBackwardMemory {
  using Shapes = BackwardShapes<Config>;
  static constexpr int kSharedBytes =
      Shapes::kServiceOffset + ServiceStaging<Config, Shapes>::kBytes;
};

// What all roles see of the shared memory.
template <class Config>
struct FusedBackwardStages : BackwardStages<BackwardShapes<Config>> {
  using Shapes = BackwardShapes<Config>;
  unsigned char* memory;

  __device__ __forceinline__ explicit FusedBackwardStages(unsigned char* shared_memory)
      : BackwardStages<Shapes>(tile::shared_address(shared_memory)), memory(shared_memory) {}

  // Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init() const {
    this->query.init(kBackwardConsumers * 128);
    this->dout.init(kBackwardConsumers * 128);
    this->keys.init(1);
    for (int consumer = 0; consumer < kBackwardConsumers; ++consumer)
      sums(consumer).init(1, /*fillers=*/128);
    ptx::mbarrier_init_fence();
  }

  __device__ __forceinline__ typename Shapes::SumsRing sums(int consumer) const {
    return {this->shared + Shapes::kSumsRingOffset + consumer * Shapes::SumsRing::kBytes};
  }
  // Where a consumer stages its part of dq.
  __device__ __forceinline__ unsigned char* staged_sums(int consumer) const {
    return memory + Shapes::kQueryGradientOffset +
           Shapes::query_gradient_offset(consumer) * static_cast<int>(sizeof(float));
  }
};

// Sends what the consumers stage of dq, in the order in which it comes: of every step the second
// consumer's part, then that of the first, which lags. Threads: one.
template <class Config>
struct QueryGradientSender {
  using Shapes = BackwardShapes<Config>;
  using Walk = BackwardWalk<Config>;
  static constexpr int kParts = 1 + (Shapes::query_gradient_steps(1) > 0);
  const BackwardParams& backward;
  const FusedBackwardStages<Config>& stages;
  const Walk& walk;
  typename Walk::Step step;
  int steps_sent = 0;

  __device__ __forceinline__ QueryGradientSender(const BackwardParams& params,
                                                 const FusedBackwardStages<Config>& shared_stages,
                                                 const Walk& walked)
      : backward(params), stages(shared_stages), walk(walked), step(walked.first()) {}

  // Until the parts of so many steps have been sent.
  __device__ __forceinline__ void send_until(int steps) {
#pragma unroll 1
    for (; steps_sent < steps; ++steps_sent) {
      send<1>();
      send<0>();
      walk.advance(step);
    }
  }

 private:
  template <int kConsumer>
  __device__ __forceinline__ void send() const {
    if constexpr (kConsumer < kParts) {
      stages.sums(kConsumer).wait_full(
          typename Shapes::SumsPosition{static_cast<unsigned>(steps_sent)});
      const long long row = attention::workspace_row(backward, walk.place.batch, step.head,
                                                     step.query_tile * Config::kTileQ);
      tile::BulkAccumulator<typename Shapes::template QueryGradient<kConsumer>>{
          backward.dq_accum + row * backward.padded_columns +
          Shapes::query_gradient_offset(kConsumer)}
          .send(stages.staged_sums(kConsumer));
      ptx::bulk_commit();
      // The second consumer has a step's time until it stages again, the first one that of its dv
      // and dq.
      ptx::bulk_wait_read<kParts - 1>();
      // The very first part has none before it.
      if (kConsumer == 0 || steps_sent > 0)
        stages.sums((kConsumer + kParts - 1) % kParts).release(0);
    }
  }
};

// Threads: one.
template <class Config>
__device__ __forceinline__ void produce_backward(const Sm90FusedBackwardParams& params,
                                                 const FusedBackwardStages<Config>& stages) {
  using Shapes = BackwardShapes<Config>;
  using KeyTile = typename Shapes::KeyTile;
  const AttentionParams& attention = params.backward.attention;
  const BackwardWalk<Config> walk(attention, fused_place<Config>(params));
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;
  QueryGradientSender<Config> sender(params.backward, stages, walk);
  load_queries<Config>(
      params.q, params.dout, params.backward, static_cast<const BackwardStages<Shapes>&>(stages),
      walk, query_at, dout_at,
      [&] {
        const auto load = [&](int stage, int offset, const TensorMap& map, int batches) {
          const unsigned barrier = stages.keys.full(stage);
          ptx::mbarrier_arrive_expect(barrier, KeyTile::kBytes);
          load_tile<KeyTile>(stages.shared + offset, map, barrier, ptx::kEvictLast, walk.first_key,
                             walk.place.head, attention::own_batch(walk.place.batch, batches));
        };
        load(Shapes::kKeyStage, Shapes::kKeyOffset, params.k, attention.k.batches);
        load(Shapes::kValueStage, Shapes::kValueOffset, params.v, attention.v.batches);
        RowService<Config, Shapes>(params, stages.memory).await_prepared();
      },
      // The stage of query tile n is let go of in step n - kQueryStages. What consumers have told
      // of until then, the parts of the steps before, is sent first. With fewer stages of dout it
      // must not be later: before a stage of that is let go of, the first consumer may wait for a
      // part.
      [&](int n) { sender.send_until(n - min(Config::kQueryStages, Config::kDoutStages)); });
  sender.send_until(walk.steps());
  ptx::await_previous_grid();  // also without a walk, since who waits for this grid waits for both
  RowService<Config, Shapes>(params, stages.memory).tell_added();
}

// Threads: a whole warpgroup.
template <class Config, int kConsumer>
__device__ __forceinline__ void consume_backward(const Sm90FusedBackwardParams& params,
                                                 const FusedBackwardStages<Config>& stages) {
  using Shapes = BackwardShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  using DscoresTile = typename Shapes::DscoresTile;
  using Scores = typename Shapes::Scores;
  using Step = typename BackwardWalk<Config>::Step;
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;
  const BackwardWalk<Config> walk(attention, fused_place<Config>(params));
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
  const tile::RowDescriptor<DscoresTile> dscores_rows(stages.shared + Shapes::kDscoresOffset,
                                                      Shapes::kSplitsRows ? kFirstRow : 0);
  const tile::ColumnDescriptor<KeyTile> k_columns(stages.shared + Shapes::kKeyOffset +
                                                  (Shapes::kSplitsRows ? 0 : kConsumer) *
                                                      Shapes::kSplitBytes);

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

  const auto start_scores = [&](const typename Shapes::QueryPosition& at) {
    tile::start_shared_product<Element, Shapes::kHeadDimSteps>(scores, k_rows, 0, q_rows,
                                                               at.stage() * QueryTile::kBytes);
  };
  const auto statistics = [&](int offset, int stage) {
    return reinterpret_cast<const float*>(stages.memory + offset +
                                          stage * Shapes::kStatisticsBytes);
  };
  const auto tile_of = [&](const Step& step) {
    return ScoreTile{batch, step.head, step.query_tile * Config::kTileQ, walk.first_key,
                     walk.first_key + warp_row};
  };
  ColumnStatistics<Scores> lse;
  ColumnStatistics<Scores> delta;
  const auto finish_scores = [&](const Step& step) {
    const ScoreTile tile = tile_of(step);
    make_probs<Config>(scores, attention, tile, lse);
    dropout.draw(attention, batch, step.head, tile.layout());
  };
  const auto finish_dprobs = [&](const Step& step) {
    const ScoreTile tile = tile_of(step);
    const attention::ScoreTransform<Config> transform(attention, batch, step.head);
#pragma unroll
    for (int n = 0; n < Scores::kColumnTiles; ++n)
      make_dscores<Config>(dprobs, n, scores.values[0][n], dropout, transform, tile.layout(),
                           attention.dropout_scale, delta.take(n),
                           statistics(Shapes::kLseOffset, query_at.stage()));
  };

  // From products that have been started to probabilities, and to dprobs that have come.
  const auto finish_products = [&](const Step& step) {
    lse.load(statistics(Shapes::kLseOffset, query_at.stage()));
    ptx::wgmma_wait<1>();  // scores
    finish_scores(step);
    delta.load(statistics(Shapes::kDeltaOffset, dout_at.stage()));
    ptx::wgmma_wait<0>();  // dprobs
  };

  const auto start_dprobs = [&] {
    tile::start_shared_product<Element, Shapes::kHeadDimSteps>(dprobs, v_rows, 0, dout_rows,
                                                               dout_at.stage() * QueryTile::kBytes);
  };
  // dq of the step whose dscores lie in a stage.
  typename Shapes::template QueryGradient<kConsumer> dq;
  const auto start_query_gradient = [&](int stage) {
    if constexpr (Shapes::query_gradient_steps(kConsumer) > 0) {
      tile::start_shared_product<Element, Shapes::kKeySteps>(
          dq, dscores_rows, stage * DscoresTile::kBytes, k_columns, 0);
    } else {
      ptx::wgmma_commit();
    }
  };
  const int steps = walk.steps();
  int remaining = steps;
  const auto sums = stages.sums(kConsumer);
  typename Shapes::SumsPosition sums_at;
  const auto stage_query_gradient = [&] {
    if constexpr (Shapes::query_gradient_steps(kConsumer) > 0) {
      sums.await_empty(sums_at);
      tile::BulkAccumulator<typename Shapes::template QueryGradient<kConsumer>>::stage(
          dq, stages.staged_sums(kConsumer));
    }
  };
  // In its first turn the first consumer finds no dscores, and stages what nobody sends.
  const auto announce_query_gradient = [&] {
    if constexpr (Shapes::query_gradient_steps(kConsumer) > 0) {
      ptx::fence_async_proxy();
      if (steps - remaining > 1 - kConsumer) {
        sums.finish_fill(sums_at);
        sums_at.advance();
      }
    }
  };

  Step step{};
  if (remaining > 0) {
    step = walk.first();
    if constexpr (kConsumer == 1) ptx::barrier_arrive(kTurnBarrier, 256);  // the first turn
    ptx::mbarrier_wait(stages.keys.full(Shapes::kKeyStage), 0);
    stages.query.wait_full(query_at);
    start_scores(query_at);
    ptx::mbarrier_wait(stages.keys.full(Shapes::kValueStage), 0);
    stages.dout.wait_full(dout_at);
    start_dprobs();
    finish_products(step);
  }
#pragma unroll 1
  while (remaining > 0) {
    typename Shapes::Probs rounded_probs;
    round_probs<Config>(scores, dropout, rounded_probs);
    finish_dprobs(step);
    typename Shapes::Probs rounded_dscores;
    rounded_dscores.template pack<Element>(dprobs);
    tile::store_transposed<DscoresTile>(
        stages.shared + Shapes::kDscoresOffset + dscores_stage * DscoresTile::kBytes,
        rounded_dscores, kConsumer * 4 + warp);
    ptx::fence_async_proxy();

    ptx::barrier_sync(kTurnBarrier + kConsumer, 256);  // dscores are there, see the table above
    tile::start_register_product<Element>(dv, rounded_probs, dout_columns,
                                          dout_at.stage() * QueryTile::kBytes);
    start_query_gradient(kConsumer == 0 ? dscores_stage ^ 1 : dscores_stage);
    tile::start_register_product<Element>(dk, rounded_dscores, q_columns,
                                          query_at.stage() * QueryTile::kBytes);
    dscores_stage ^= 1;
    ptx::wgmma_wait<1>();  // dv and dq
    // Every thread has read lse and delta for itself.
    stages.dout.release(dout_at.stage());
    auto next_query = query_at;
    next_query.advance();
    if (remaining > 1) stages.query.wait_full(next_query);
    // Behind the last step, of what lies there, and nobody looks at it.
    if constexpr (Shapes::kScoresFirst) start_scores(next_query);
    stage_query_gradient();
    if (--remaining == 0) {
      announce_query_gradient();
      ptx::wgmma_wait<0>();  // dk
      stages.query.release(query_at.stage());
      ptx::barrier_arrive(kTurnBarrier + 1 - kConsumer, 256);
      break;
    }
    if constexpr (!Shapes::kScoresFirst) start_scores(next_query);
    ptx::wgmma_wait<1>();  // dk
    stages.query.release(query_at.stage());
    query_at = next_query;
    dout_at.advance();
    stages.dout.wait_full(dout_at);
    start_dprobs();
    ptx::barrier_arrive(kTurnBarrier + 1 - kConsumer, 256);
    announce_query_gradient();
    walk.advance(step);
    finish_products(step);
  }

  const auto store_key_gradients = [&] {
    const bool spoilt = !dk.is_finite() || !dv.is_finite();
    dk.scale(attention.softmax_scale);
    if constexpr (Config::kDropout) dv.scale(attention.dropout_scale);
    store_key_gradient<Config>(backward.dk, dk, walk.place, attention.seqlen_k, warp_row);
    store_key_gradient<Config>(backward.dv, dv, walk.place, attention.seqlen_k, warp_row);
    if constexpr (Config::kWindowed) {
      if (spoilt) backward.spoilt[batch * attention.heads + walk.place.head * walk.group] = 1;
    }
  };
  store_key_gradients();
  if constexpr (kConsumer == 0) {
    if (steps > 0) {
      ptx::barrier_sync(kTurnBarrier, 256);
      start_query_gradient(dscores_stage ^ 1);
      ptx::wgmma_wait<0>();
      stage_query_gradient();
      ptx::fence_async_proxy();
      sums.finish_fill(sums_at);
    }
  }
}

template <class Config>
__device__ __forceinline__ void backward(const Sm90FusedBackwardParams& params,
                                         unsigned char* shared) {
  using Shapes = BackwardShapes<Config>;
  ptx::start_next_grid();
  const FusedBackwardStages<Config> stages(shared);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(params.q);
    ptx::prefetch_tensor_map(params.k);
    ptx::prefetch_tensor_map(params.v);
    ptx::prefetch_tensor_map(params.dout);
    stages.init();
  }
  __syncthreads();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 0) {
    ptx::release_registers<Shapes::kProducerRegisters>();
    const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp == 0) {
      if (ptx::elect_lane()) produce_backward<Config>(params, stages);
    } else if constexpr (Config::kServesRows) {
      // One each: what the first has worked out would stay in registers.
      RowService<Config, Shapes>(params, shared).prepare();
      RowService<Config, Shapes>(params, shared).round();
    }
  } else {
    ptx::claim_registers<Shapes::kConsumerRegisters>();
    if (warpgroup == 1) {
      consume_backward<Config, 0>(params, stages);
    } else {
      consume_backward<Config, 1>(params, stages);
    }
  }
}

// dq = scale * its fp32 sums, rounded, of the groups of heads that the main kernel leaves. One CTA
// serves one query tile of one head; its two halves read the parts of the two consumers.
template <class Config>
__device__ __forceinline__ void backward_postprocess(const BackwardParams& params,
                                                     unsigned char* shared) {
  using Shapes = BackwardShapes<Config>;
  ptx::await_previous_grid();
  const AttentionParams& attention = params.attention;
  const int query_tiles = (attention.seqlen_q + Config::kTileQ - 1) / Config::kTileQ;
  const int rounded_heads =
      attention.batch * attention.heads - static_cast<int>(gridDim.x) / query_tiles;
  const int rounded_tiles = rounded_heads * query_tiles;
  const QueryGradientTile<Config, typename Shapes::QueryTile> tile(
      params, attention::place_of(rounded_tiles + blockIdx.x, query_tiles, attention.heads));
  bool finite = true;
  if (threadIdx.x < 128) {
    finite = tile.stage(tile::Accumulator<1, Shapes::query_gradient_steps(0)>(), 0, 0, 0, shared);
  } else if constexpr (Shapes::query_gradient_steps(1) > 0) {
    finite = tile.stage(tile::Accumulator<1, Shapes::query_gradient_steps(1)>(),
                        Shapes::query_gradient_offset(1), Shapes::kSplitsRows ? 64 : 0,
                        Shapes::kSplitsRows ? 0 : Shapes::kSplitSteps, shared);
  }
  tile.store(finite, shared);
  if constexpr (Config::kWindowed) {
#pragma unroll 1
    for (int i = blockIdx.x; i < rounded_tiles; i += gridDim.x) {
      const attention::TilePlace place = attention::place_of(i, query_tiles, attention.heads);
      const bool spoilt = params.dq_spoilt[place.batch * attention.heads + place.head] != 0;
      attention::contain_gradients<Config>(params, place, spoilt, tile.kThreads / 32);
    }
  }
}

}  // namespace jfa::sm90
