// Backward attention on Hopper. With scores = scale q k^T, probs = exp(scores - lse) and
// dprobs = dout v^T, for every visible pair of a query tile and a key tile:
//
//   dv += probs^T dout      dscores = probs (dprobs - delta)
//   dk += scale dscores^T q     dq += scale dscores k
//
// One CTA stays on each multiprocessor and takes one key tile of one key head after the other; with
// each it walks the query tiles of all query heads of the head's group. One warp (the producer)
// keeps the copy engine busy, which brings tiles and takes dq; two warpgroups (consumers) own 64
// keys each. They compute scores^T and dprobs^T, rows being keys, so that probs^T and dscores^T
// feed dv and dk from registers; only dscores goes to shared memory, for dq, of which each consumer
// has a part of the columns, or with tiles of 128 queries half of the rows. dq gathers in fp32 in
// global memory (tile/bulk_accumulator.cuh). The three warps beside the producer prepare the rows
// of heads to come and round dq of heads that are done (sm90/row_service.cuh).
//
//   ring    stages        filled with                released
//   keys    1             k of a key tile, and its   by each consumer's threads, after the last dq
//                         place
//   values  1             v of it                    by each consumer's threads, after the last
//                                                    dprobs
//   service 2             the place of a key tile    by each service warp's threads
//   query   kQueryStages  q and lse of a query tile  by each consumer's threads, after dk
//   dout    kDoutStages   dout and delta             by each consumer's threads, after dv
//   sums    1, of each    a consumer's part of dq,   by the producer, when the copy engine has
//           consumer      by all its threads         read it
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
#include <sm90/tile_places.cuh>

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
  using KeyRing = tile::Ring<1>;
  using ValueRing = tile::Ring<1>;  // of its own: scores need not wait for v
  using ServiceRing = tile::Ring<2>;
  using SumsRing = tile::Ring<1>;  // one for each consumer
  using KeyPosition = tile::RingPosition<1>;
  using ServicePosition = tile::RingPosition<2>;
  using SumsPosition = tile::RingPosition<1>;
  // The service warps may be a key tile behind the consumers.
  static constexpr int kPlaces = 4;
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
  static constexpr int kServiceOffset = kQueryGradientOffset + kQueryGradientBytes;
  static_assert(kServiceOffset % 1024 == 0, "a swizzle atom's size");
  static constexpr int kLseOffset = kServiceOffset + ServiceStaging<QueryTile>::kBytes;
  static constexpr int kDeltaOffset = kLseOffset + Config::kQueryStages * kStatisticsBytes;
  static constexpr int kPlaceOffset = kDeltaOffset + Config::kDoutStages * kStatisticsBytes;
  static constexpr int kServedOffset = kPlaceOffset + kPlaces * TilePlaces::kSlotBytes;
  static constexpr int kServedBytes = 16;  // a word for each service warp, by the rings' alignment
  static constexpr int kQueryRingOffset = kServedOffset + kServedBytes;
  static constexpr int kDoutRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kKeyRingOffset = kDoutRingOffset + DoutRing::kBytes;
  static constexpr int kValueRingOffset = kKeyRingOffset + KeyRing::kBytes;
  static constexpr int kServiceRingOffset = kValueRingOffset + ValueRing::kBytes;
  static constexpr int kSumsRingOffset = kServiceRingOffset + ServiceRing::kBytes;
  static constexpr int kSharedBytes = kSumsRingOffset + kBackwardConsumers * SumsRing::kBytes;
};

// What all roles see of the shared memory.
template <class Config>
struct FusedBackwardStages : BackwardStages<BackwardShapes<Config>> {
  using Shapes = BackwardShapes<Config>;
  unsigned char* memory;
  TilePlaces places;
  typename Shapes::ValueRing values;
  typename Shapes::ServiceRing service;

  __device__ __forceinline__ explicit FusedBackwardStages(unsigned char* shared_memory)
      : BackwardStages<Shapes>(tile::shared_address(shared_memory)),
        memory(shared_memory),
        places(shared_memory + Shapes::kPlaceOffset),
        values{this->shared + Shapes::kValueRingOffset},
        service{this->shared + Shapes::kServiceRingOffset} {}

  // Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init() const {
    this->query.init(kBackwardConsumers * 128);
    this->dout.init(kBackwardConsumers * 128);
    this->keys.init(kBackwardConsumers * 128);
    values.init(kBackwardConsumers * 128);
    service.init(kServiceThreads);
    for (int warp = 0; warp < kServiceWarps; ++warp) served(warp) = 0;
    ServiceStaging<typename Shapes::QueryTile>::init(memory + Shapes::kServiceOffset);
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
  // How many key tiles a service warp is done with. Its loops leave no register for that.
  __device__ __forceinline__ volatile unsigned& served(int service_warp) const {
    return reinterpret_cast<volatile unsigned*>(memory + Shapes::kServedOffset)[service_warp];
  }
  // Where the key tile of that number, of the CTA's, lies.
  __device__ __forceinline__ attention::TilePlace place(unsigned number) const {
    return places.get(number % Shapes::kPlaces);
  }
};

// Sends what the consumers stage of dq, in the order in which it comes: of every step the second
// consumer's part, then that of the first, which lags. Threads: one.
template <class Config>
struct QueryGradientSender {
  using Shapes = BackwardShapes<Config>;
  using Walk = BackwardWalk<Config>;
  const BackwardParams& backward;
  const FusedBackwardStages<Config>& stages;
  int steps_sent = 0;  // of all key tiles
  Walk walk;           // of the key tile whose parts come next
  typename Walk::Step step;

  __device__ __forceinline__ QueryGradientSender(const BackwardParams& params,
                                                 const FusedBackwardStages<Config>& shared_stages)
      : backward(params), stages(shared_stages) {}

  // Behind all parts of the key tile before.
  __device__ __forceinline__ void begin(const Walk& of_tile) {
    walk = of_tile;
    step = walk.first();
  }
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
    if constexpr (Shapes::query_gradient_steps(kConsumer) > 0) {
      const typename Shapes::SumsPosition at{static_cast<unsigned>(steps_sent)};
      const auto sums = stages.sums(kConsumer);
      sums.wait_full(at);
      const long long row = attention::workspace_row(backward, walk.place.batch, step.head,
                                                     step.query_tile * Config::kTileQ);
      tile::BulkAccumulator<typename Shapes::template QueryGradient<kConsumer>>{
          backward.dq_accum + row * backward.padded_columns +
          Shapes::query_gradient_offset(kConsumer)}
          .send(stages.staged_sums(kConsumer));
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();  // what comes next to send or to fetch is half a step away
      sums.release(at.stage());
    }
  }
};

// Threads: one.
template <class Config>
__device__ __forceinline__ void produce_backward(const Sm90FusedBackwardParams& params,
                                                 const FusedBackwardStages<Config>& stages) {
  using Shapes = BackwardShapes<Config>;
  using KeyTile = typename Shapes::KeyTile;
  using Service = RowService<Config, Shapes>;
  const AttentionParams& attention = params.backward.attention;
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;
  typename Shapes::KeyPosition keys_at;  // counts key tiles; that of values, too
  typename Shapes::ServicePosition service_at;
  QueryGradientSender<Config> sender(params.backward, stages);
  int steps_before = 0;  // of the key tiles before this one
  // Of the key tile whose additions are not all known to be there; the sender is with it.
  attention::TilePlace untold{kNoTile, 0, 0};
  int untold_steps = 0;  // so many steps' parts have been sent when all of that tile's have
  const auto tell = [&] {
    if (untold.tile == kNoTile) return;
    sender.send_until(untold_steps);
    Service(params, stages.memory, untold).tell_added();
    untold.tile = kNoTile;
  };

  unsigned index = take_key_tile<Config>(params, /*is_first=*/true);
#pragma unroll 1
  while (true) {
    const bool ends = index >= fused_key_tiles<Config>(params);
    attention::TilePlace place{kNoTile, 0, 0};
    if (!ends) place = fused_place<Config>(params, index);
    if constexpr (Config::kServesRows) {
      // Who waits for other CTAs tells first: one of them may wait for the key tile before.
      if (!stages.service.is_empty(service_at)) tell();
      stages.service.await_empty(service_at);
    }
    stages.places.put(keys_at.fills % Shapes::kPlaces, place);
    if constexpr (Config::kServesRows) {
      stages.service.announce(service_at, 0);
      service_at.advance();
    }
    const BackwardWalk<Config> walk(attention, place);
    const int steps = ends ? 0 : walk.steps();
    bool follows = false;
    const auto follow = [&] {
      if (follows) return;
      tell();
      sender.begin(walk);
      untold = place;
      untold_steps = steps_before + steps;
      follows = true;
    };
    if (steps == 0) {
      sender.send_until(steps_before);
      stages.values.await_empty(keys_at);
      stages.values.announce(keys_at, 0);
      stages.keys.await_empty(keys_at);
      stages.keys.announce(keys_at, 0);
      keys_at.advance();
      if (ends) break;
    } else {
      load_queries<Config>(
          params.q, params.dout, params.backward,
          static_cast<const BackwardStages<Shapes>&>(stages), walk, query_at, dout_at,
          [&] {
            const auto load = [&](const auto& ring, int offset, const TensorMap& map, int batches) {
              ring.await_empty(keys_at);
              ring.announce(keys_at, KeyTile::kBytes);
              load_tile<KeyTile>(stages.shared + offset, map, ring.full(0), ptx::kEvictLast,
                                 walk.first_key, walk.place.head,
                                 attention::own_batch(walk.place.batch, batches));
            };
            const Service service(params, stages.memory, place);
            const bool is_first = keys_at.fills == 0;  // does not wait for the kernel before
            // Consumers use v of a key tile for the last time a step before k, and before that they
            // wait for all parts of dq but the last step's to be sent.
            sender.send_until(steps_before - 1);
            load(stages.values, Shapes::kValueOffset, params.v, attention.v.batches);
            if (!is_first) {
              if (!service.is_prepared()) tell();
              service.await_prepared();
            }
            load(stages.keys, Shapes::kKeyOffset, params.k, attention.k.batches);
            if (is_first) service.await_prepared();
            keys_at.advance();
          },
          // The stage of query tile n is let go of in step n - kQueryStages. What consumers have
          // told of until then, the parts of the steps before, is sent first.
          [&](int n) {
            const int until = steps_before + n - min(Config::kQueryStages, Config::kDoutStages);
            if (until > steps_before) follow();
            sender.send_until(until);
          });
    }
    follow();
    steps_before += steps;
    ptx::await_previous_grid();  // also without steps, since who waits for this grid waits for both
    index = take_key_tile<Config>(params, /*is_first=*/false);
  }
  tell();
}

// Which of the consumers runs a piece of code.
//
// Both run the same one where their parts of dq have one shape. With code for each, what a key tile
// goes through, with the producer's and the service's, is more than the instruction cache holds:
// under a causal mask warps waited for instructions a quarter of their time (docs/tuning.md).
template <int kNumber>
struct KnownConsumer {
  static constexpr int kShape = kNumber;  // whose part of dq has that shape
  __device__ __forceinline__ constexpr operator int() const { return kNumber; }
};
struct EitherConsumer {
  static constexpr int kShape = 0;
  int number;
  __device__ __forceinline__ operator int() const { return number; }
};

// Threads: a whole warpgroup.
template <class Config, class Consumer>
__device__ __forceinline__ void consume_backward(const Sm90FusedBackwardParams& params,
                                                 const FusedBackwardStages<Config>& stages,
                                                 const Consumer consumer) {
  using Shapes = BackwardShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  using DscoresTile = typename Shapes::DscoresTile;
  using Scores = typename Shapes::Scores;
  using Step = typename BackwardWalk<Config>::Step;
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;

  using QueryGradient = typename Shapes::template QueryGradient<Consumer::kShape>;
  constexpr bool kHasQueryGradient = Shapes::query_gradient_steps(Consumer::kShape) > 0;
  const int first_row = consumer * 64;
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32);
  const int warp_row = first_row + warp * 16;

  const tile::RowDescriptor<KeyTile> k_rows(stages.shared + Shapes::kKeyOffset, first_row);
  const tile::RowDescriptor<KeyTile> v_rows(stages.shared + Shapes::kValueOffset, first_row);
  const tile::RowDescriptor<QueryTile> q_rows(stages.shared + Shapes::kQueryOffset, 0);
  const tile::RowDescriptor<QueryTile> dout_rows(stages.shared + Shapes::kDoutOffset, 0);
  const tile::ColumnDescriptor<QueryTile> q_columns(stages.shared + Shapes::kQueryOffset);
  const tile::ColumnDescriptor<QueryTile> dout_columns(stages.shared + Shapes::kDoutOffset);
  const tile::RowDescriptor<DscoresTile> dscores_rows(stages.shared + Shapes::kDscoresOffset,
                                                      Shapes::kSplitsRows ? first_row : 0);
  const tile::ColumnDescriptor<KeyTile> k_columns(stages.shared + Shapes::kKeyOffset +
                                                  (Shapes::kSplitsRows ? 0 : consumer) *
                                                      Shapes::kSplitBytes);

  typename Shapes::KeyPosition keys_at;  // counts key tiles; that of values, too
  // Steps so far, of all key tiles. What they go by follows from it.
  unsigned done = 0;
  const auto query_at = [&] { return typename Shapes::QueryPosition{done}; };
  const auto dout_at = [&] { return typename Shapes::DoutPosition{done}; };
  const auto dscores_stage = [&] { return done % 2; };
  const auto sums = stages.sums(consumer);

#pragma unroll 1
  while (true) {
    stages.keys.wait_full(keys_at);
    const attention::TilePlace place = stages.place(keys_at.fills);
    if (place.tile == kNoTile) break;
    const BackwardWalk<Config> walk(attention, place);
    const int batch = place.batch;
    typename Shapes::KeyGradient dk;
    typename Shapes::KeyGradient dv;
    dk.clear();
    dv.clear();
    Scores scores;
    Scores dprobs;
    KeptBits<Config, Scores> dropout;
    // Dropout takes a register.
    constexpr int kAhead = Scores::kColumnTiles / (Config::kDropout ? 4 : 2);
    ColumnStatistics<Scores, kAhead> lse;
    ColumnStatistics<Scores, kAhead> delta;
    QueryGradient dq;
    // What the tile before has left in them would stay in registers.
    scores.clear();
    dprobs.clear();
    dq.clear();

    const auto start_scores = [&](const typename Shapes::QueryPosition& at) {
      tile::start_shared_product<Element, Shapes::kHeadDimSteps, !Shapes::kScoresFirst>(
          scores, k_rows, 0, q_rows, at.stage() * QueryTile::kBytes);
    };
    const auto statistics = [&](int offset, int stage) {
      return reinterpret_cast<const float*>(stages.memory + offset +
                                            stage * Shapes::kStatisticsBytes);
    };
    const auto start_dprobs = [&] {
      tile::start_shared_product<Element, Shapes::kHeadDimSteps, true>(
          dprobs, v_rows, 0, dout_rows, dout_at().stage() * QueryTile::kBytes);
    };
    // dq of the step whose dscores lie in a stage.
    const auto start_query_gradient = [&](int stage) {
      if constexpr (kHasQueryGradient) {
        tile::start_shared_product<Element, Shapes::kKeySteps, true>(
            dq, dscores_rows, stage * DscoresTile::kBytes, k_columns, 0);
      } else {
        ptx::wgmma_commit();
      }
    };
    const auto tile_of = [&](const Step& step) {
      return ScoreTile{batch, step.head, step.query_tile * Config::kTileQ, walk.first_key,
                       walk.first_key + warp_row};
    };
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
                             statistics(Shapes::kLseOffset, query_at().stage()));
    };

    // From products that have been started to probabilities, and to dprobs that have come.
    const auto finish_products = [&](const Step& step) {
      lse.load(statistics(Shapes::kLseOffset, query_at().stage()));
      ptx::wgmma_wait<1>();  // scores
      finish_scores(step);
      delta.load(statistics(Shapes::kDeltaOffset, dout_at().stage()));
      ptx::wgmma_wait<0>();  // dprobs
    };

    const int steps = walk.steps();
    int remaining = steps;
    Step step{};
    // parts: of this consumer, staged before.
    const auto stage_query_gradient = [&](unsigned parts) {
      if constexpr (kHasQueryGradient) {
        sums.await_empty(typename Shapes::SumsPosition{parts});
        tile::BulkAccumulator<QueryGradient>::stage(dq, stages.staged_sums(consumer));
      }
    };
    const auto announce_query_gradient = [&](bool is_sent) {
      if constexpr (kHasQueryGradient) {
        ptx::fence_async_proxy();
        if (is_sent) sums.finish_fill(typename Shapes::SumsPosition{});
      }
    };
    // In its first turn the first consumer finds no dscores, and stages what nobody sends.
    const auto turned_before = [&] { return consumer == 1 || remaining + 1 < steps; };

    if (remaining > 0) {
      step = walk.first();
      if (consumer == 1) ptx::barrier_arrive(kTurnBarrier, 256);  // the first turn
      stages.query.wait_full(query_at());
      start_scores(query_at());
      stages.values.wait_full(keys_at);
      stages.dout.wait_full(dout_at());
      start_dprobs();
      finish_products(step);
      if (remaining == 1) stages.values.release(0);
    }
#pragma unroll 1
    while (remaining > 0) {
      typename Shapes::Probs rounded_probs;
      round_probs<Config>(scores, dropout, rounded_probs);
      finish_dprobs(step);
      typename Shapes::Probs rounded_dscores;
      rounded_dscores.template pack<Element>(dprobs);
      tile::store_transposed<DscoresTile>(
          stages.shared + Shapes::kDscoresOffset + dscores_stage() * DscoresTile::kBytes,
          rounded_dscores, consumer * 4 + warp);
      ptx::fence_async_proxy();

      ptx::barrier_sync(kTurnBarrier + consumer, 256);  // dscores are there, see the table above
      tile::start_register_product<Element>(dv, rounded_probs, dout_columns,
                                            dout_at().stage() * QueryTile::kBytes);
      start_query_gradient(consumer == 0 ? dscores_stage() ^ 1 : dscores_stage());
      tile::start_register_product<Element>(dk, rounded_dscores, q_columns,
                                            query_at().stage() * QueryTile::kBytes);
      ptx::wgmma_wait<1>();  // dv and dq
      // Every thread has read lse and delta for itself.
      stages.dout.release(dout_at().stage());
      const typename Shapes::QueryPosition next_query{done + 1};
      if (remaining > 1) stages.query.wait_full(next_query);
      // Behind the last step, of what lies there, and nobody looks at it.
      if constexpr (Shapes::kScoresFirst) start_scores(next_query);
      stage_query_gradient(done - (consumer == 0 && remaining < steps));
      if (--remaining == 0) {
        announce_query_gradient(turned_before());
        ptx::wgmma_wait<0>();  // dk
        stages.query.release(query_at().stage());
        ++done;
        ptx::barrier_arrive(kTurnBarrier + 1 - consumer, 256);
        break;
      }
      if constexpr (!Shapes::kScoresFirst) start_scores(next_query);
      ptx::wgmma_wait<1>();  // dk
      stages.query.release(query_at().stage());
      ++done;
      stages.dout.wait_full(dout_at());
      start_dprobs();
      ptx::barrier_arrive(kTurnBarrier + 1 - consumer, 256);
      announce_query_gradient(turned_before());
      walk.advance(step);
      finish_products(step);
      if (remaining == 1) stages.values.release(0);
    }

    const auto store_key_gradients = [&] {
      // Read again: kept, it would take registers from the loop above.
      const attention::TilePlace stored = stages.place(keys_at.fills);
      const bool spoilt = !dk.is_finite() || !dv.is_finite();
      dk.scale(attention.softmax_scale);
      if constexpr (Config::kDropout) dv.scale(attention.dropout_scale);
      store_key_gradient<Config>(backward.dk, dk, stored, attention.seqlen_k, warp_row);
      store_key_gradient<Config>(backward.dv, dv, stored, attention.seqlen_k, warp_row);
      if constexpr (Config::kWindowed) {
        if (spoilt)
          backward.spoilt[stored.batch * attention.heads +
                          stored.head * (attention.heads / attention.heads_k)] = 1;
      }
    };
    if (steps == 0) stages.values.release(0);
    if (consumer == 1) stages.keys.release(0);
    store_key_gradients();
    if (consumer == 0) {
      if (steps > 0) {
        ptx::barrier_sync(kTurnBarrier, 256);
        start_query_gradient(dscores_stage() ^ 1);
        ptx::wgmma_wait<0>();
        stages.keys.release(0);
        stage_query_gradient(done - 1);
        announce_query_gradient(true);
      } else {
        stages.keys.release(0);
      }
    }
    keys_at.advance();
  }
}

// Threads: the service warps.
template <class Config>
__device__ __forceinline__ void serve_rows(const Sm90FusedBackwardParams& params,
                                           const FusedBackwardStages<Config>& stages) {
  using Shapes = BackwardShapes<Config>;
  using Service = RowService<Config, Shapes>;
  const auto served = [&]()->volatile unsigned& {
    return stages.served(ptx::uniform(ptx::reread_thread() / 32) - 1);
  };
#pragma unroll 1
  while (true) {
    stages.service.wait_full(typename Shapes::ServicePosition{served()});
    if (stages.place(served()).tile == kNoTile) break;
    // One each: what the first has worked out would stay in registers.
    Service(params, stages.memory, stages.place(served())).prepare();
    Service(params, stages.memory, stages.place(served())).tell_prepared();
    Service(params, stages.memory, stages.place(served())).round();
    stages.service.release(typename Shapes::ServicePosition{served()}.stage());
    volatile unsigned& count = served();
    __syncwarp();  // all lanes have read it
    if (ptx::elect_lane()) count = count + 1;
    __syncwarp();
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
      serve_rows<Config>(params, stages);
    }
  } else {
    ptx::claim_registers<Shapes::kConsumerRegisters>();
    if constexpr (Shapes::query_gradient_steps(0) == Shapes::query_gradient_steps(1)) {
      consume_backward<Config>(params, stages, EitherConsumer{warpgroup - 1});
    } else if (warpgroup == 1) {
      consume_backward<Config>(params, stages, KnownConsumer<0>());
    } else {
      consume_backward<Config>(params, stages, KnownConsumer<1>());
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
