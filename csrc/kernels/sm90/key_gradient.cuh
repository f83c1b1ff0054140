// dk and dv on Hopper, by themselves. With scores = scale q k^T, probs = exp(scores - lse) and
// dprobs = dout v^T, for every query tile that sees a key tile:
//
//   dv += probs^T dout      dscores = probs (dprobs - delta)      dk += scale dscores^T q
//
// One CTA stays on each multiprocessor and computes key tiles until there are none left; for each
// it walks the query tiles of all query heads of the key head's group, or a part of one's
// (attention/query_group.cuh). One warp (the producer) keeps the copy engine busy; two warpgroups
// (consumers) own 64 keys each. They compute scores^T and dprobs^T, rows being keys, so that
// probs^T and dscores^T feed dv and dk from registers, and nothing is exchanged between warps.
//
//   ring    stages        filled with                released
//   keys    2             k and v of a key tile,     by each consumer's threads, after dk and dv
//                         and its place
//   query   kQueryStages  q and lse of a query tile  by each consumer's threads, after dk
//   dout    kDoutStages   dout and delta             by each consumer's threads, after dv
//   gate    1             nothing, once: all lse     never
//                         and delta are there
//
// Under a mask the first query tile of a walk may see nothing of a tile's second half: whoever owns
// that half skips the step. The other consumer owns it the next time, so that neither is more than
// one step ahead, which takes three stages of q and of dout.
//
// The gate is opened by a warp of its own, which waits for the kernel of dq to have worked them out
// (sm90/query_statistics.cuh), not to have ended.
//
//   barrier  threads               what it orders
//   1, 2     both consumers (256)  the turns of consumer 0 and of consumer 1
//
// In its turn a consumer starts dv and dk of a step, then scores and dprobs of the next, and passes
// the turn on; its exponentials run while the other has its turn. The last step of a key tile so
// starts the first one of the next, which runs while dk and dv are written.
#pragma once

#include <attention/tile_order.cuh>
#include <sm90/backward_steps.cuh>
#include <sm90/query_statistics.cuh>
#include <sm90/tile_places.cuh>

namespace jfa::sm90 {

// Which half of a key tile a consumer owns.
template <bool kSkipsHidden>
struct OwnedHalf {
  int first_row;
  int row;  // of the warp

  __device__ __forceinline__ OwnedHalf(int consumer, int warp)
      : first_row(consumer * 64), row(first_row + warp * 16) {}

  __device__ __forceinline__ int first() const { return first_row; }
  __device__ __forceinline__ int warp_row() const { return row; }
  __device__ __forceinline__ int warp_row_before() const { return row; }  // in the tile before
  // A constant: with the value of a call ptxas spills a register (ALiBi, head dim 128).
  static __device__ constexpr bool skips_first() { return false; }
  __device__ __forceinline__ void advance() {}
};

// Where the second half may skip the first step of a walk. In one register: there is none to spare.
template <>
struct OwnedHalf<true> {
  static constexpr int kRows = 127;     // the warp's first row in the tile
  static constexpr int kSkips = 128;    // whether the second half skips the step
  static constexpr int kSwapped = 256;  // whether consumers have swapped halves for this tile
  int state;

  __device__ __forceinline__ OwnedHalf(int consumer, int warp) : state(consumer * 64 + warp * 16) {}

  __device__ __forceinline__ int first() const { return state & 64; }
  __device__ __forceinline__ int warp_row() const { return state & kRows; }
  __device__ __forceinline__ int warp_row_before() const {
    return warp_row() ^ (state & kSwapped) / (kSwapped / 64);
  }
  __device__ __forceinline__ bool skips_first() const {
    return (state & (kSkips | 64)) == (kSkips | 64);
  }
  __device__ __forceinline__ void skip_hidden() { state |= kSkips; }
  // Goes to the next tile. Who has skipped a step is one ahead, and has the first half there.
  __device__ __forceinline__ void advance() {
    const int swaps = state & kSkips;
    state = (warp_row() ^ swaps / (kSkips / 64)) | swaps * (kSwapped / kSkips);
  }
};

template <class Config>
struct KeyGradientShapes {
  static_assert(Config::kTileK == 64 * kBackwardConsumers, "a consumer owns 64 keys");
  static_assert(Config::kQueryStages > 1 && Config::kDoutStages > 1,
                "the next key tile's first stage is filled beside the last of this one");
  static constexpr int kTurnBarrier = 1;  // and 2
  // Who is a step ahead starts the step after the next.
  static constexpr bool kSkipsHidden =
      Config::kWindowed && Config::kQueryStages > 2 && Config::kDoutStages > 2;
  // Of products of few steps it costs 5% at head dim 64, of others it saves 2% (docs/tuning.md).
  static constexpr bool kUniform = Config::kHeadDim > 64;
  static constexpr int kKeyStages = 2;
  static constexpr int kPlaces = kKeyStages;  // a place is read before its stage is released
  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kQuerySteps = Config::kTileQ / 16;

  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<Config::kTileK, Config::kHeadDim>;
  using Scores = tile::Accumulator<1, kQuerySteps>;
  using Operand = tile::RegisterOperand<1, kQuerySteps>;
  using Gradient = tile::Accumulator<1, kHeadDimSteps>;

  using QueryRing = tile::Ring<Config::kQueryStages>;
  using DoutRing = tile::Ring<Config::kDoutStages>;
  using KeyRing = tile::Ring<kKeyStages>;
  using QueryPosition = tile::RingPosition<Config::kQueryStages>;
  using DoutPosition = tile::RingPosition<Config::kDoutStages>;
  using KeyPosition = tile::RingPosition<kKeyStages>;
  static constexpr int kStatisticsBytes = Config::kTileQ * 4;

  static constexpr int kKeyBytes = 2 * KeyTile::kBytes;  // k and v of a stage
  static constexpr int kKeyOffset = 0;
  static constexpr int kQueryOffset = kKeyOffset + kKeyStages * kKeyBytes;
  static constexpr int kDoutOffset = kQueryOffset + Config::kQueryStages * QueryTile::kBytes;
  static constexpr int kLseOffset = kDoutOffset + Config::kDoutStages * QueryTile::kBytes;
  static constexpr int kDeltaOffset = kLseOffset + Config::kQueryStages * kStatisticsBytes;
  static constexpr int kPlaceOffset = kDeltaOffset + Config::kDoutStages * kStatisticsBytes;
  static constexpr int kQueryRingOffset = kPlaceOffset + kPlaces * TilePlaces::kSlotBytes;
  static constexpr int kDoutRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kKeyRingOffset = kDoutRingOffset + DoutRing::kBytes;
  static constexpr int kGateOffset = kKeyRingOffset + KeyRing::kBytes;
  static constexpr int kSharedBytes = kGateOffset + StatisticsGate::Ring::kBytes;
};

// What both roles see of the shared memory.
template <class Config>
struct KeyGradientStages : BackwardStages<KeyGradientShapes<Config>> {
  using Shapes = KeyGradientShapes<Config>;
  TilePlaces places;
  StatisticsGate gate;

  __device__ __forceinline__ explicit KeyGradientStages(unsigned char* shared_memory)
      : BackwardStages<Shapes>(tile::shared_address(shared_memory)),
        places(shared_memory + Shapes::kPlaceOffset),
        gate{{this->shared + Shapes::kGateOffset}} {}
};

// Threads: one.
template <class Config>
__device__ __forceinline__ void produce_key_gradient(const Sm90DealtBackwardParams& params,
                                                     const KeyGradientStages<Config>& stages) {
  using Shapes = KeyGradientShapes<Config>;
  using Place = attention::TilePlace;
  using KeyTile = typename Shapes::KeyTile;
  const AttentionParams& attention = params.backward.attention;
  typename Shapes::KeyPosition keys_at;
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;
  attention::TileOrder<Config, /*kOfKeys=*/true> order(attention, params.tiles);
  const auto load_keys = [&](const Place& place) {
    stages.keys.await_empty(keys_at);
    stages.places.put(keys_at.stage(), place);
    if (place.tile == kNoTile) {
      stages.keys.announce(keys_at, 0);
      return;
    }
    const unsigned barrier = stages.keys.full(keys_at.stage());
    const unsigned target =
        stages.shared + Shapes::kKeyOffset + keys_at.stage() * Shapes::kKeyBytes;
    const int row = place.tile * Config::kTileK;
    const int head = attention::own_key_head(params.backward, place.head);
    stages.keys.announce(keys_at, Shapes::kKeyBytes);
    load_tile<KeyTile>(target, params.k, barrier, ptx::kEvictLast, row, head,
                       attention::own_batch(place.batch, attention.k.batches));
    load_tile<KeyTile>(target + KeyTile::kBytes, params.v, barrier, ptx::kEvictLast, row, head,
                       attention::own_batch(place.batch, attention.v.batches));
    keys_at.advance();
  };

  stages.gate.await();
  Place place = next_place(order);
  load_keys(place);
#pragma unroll 1
  while (place.tile != kNoTile) {
    load_queries<Config>(
        params.q, params.dout, params.backward, static_cast<const BackwardStages<Shapes>&>(stages),
        BackwardWalk<Config, false>(attention, place), query_at, dout_at, [] {}, [](int) {});
    order.advance();
    place = next_place(order);
    load_keys(place);
  }
}

// Threads: a whole warpgroup.
template <class Config>
__device__ __forceinline__ void consume_key_gradient(const Sm90DealtBackwardParams& params,
                                                     const KeyGradientStages<Config>& stages,
                                                     unsigned char* shared, int consumer) {
  using Shapes = KeyGradientShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  using Scores = typename Shapes::Scores;
  using Walk = BackwardWalk<Config, false>;
  using Step = typename Walk::Step;
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;

  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32);
  // Of the key tile that products have been started of.
  OwnedHalf<Shapes::kSkipsHidden> half(consumer, warp);

  typename Shapes::Gradient dk;
  typename Shapes::Gradient dv;
  Scores scores;
  Scores dprobs;
  // ALiBi takes registers.
  constexpr int kAhead = Scores::kColumnTiles / (Config::kAlibi ? 4 : 2);
  ColumnStatistics<Scores, kAhead> lse;
  ColumnStatistics<Scores, kAhead> delta;
  typename Shapes::Operand rounded_probs;
  typename Shapes::Operand rounded_dscores;
  typename Shapes::KeyPosition keys_at;
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;

  // Worked out anew at every use, or else the compiler keeps what follows in registers.
  const auto base = [&](int offset) { return ptx::opaque(stages.shared) + offset; };
  const auto start_scores = [&] {
    tile::start_shared_product<Element, Shapes::kHeadDimSteps, /*kFresh=*/false, Shapes::kUniform>(
        scores, tile::RowDescriptor<KeyTile>(base(Shapes::kKeyOffset), half.first()),
        keys_at.stage() * Shapes::kKeyBytes,
        tile::RowDescriptor<QueryTile>(base(Shapes::kQueryOffset), 0),
        query_at.stage() * QueryTile::kBytes);
  };
  const auto start_dprobs = [&] {
    tile::start_shared_product<Element, Shapes::kHeadDimSteps, /*kFresh=*/false, Shapes::kUniform>(
        dprobs,
        tile::RowDescriptor<KeyTile>(base(Shapes::kKeyOffset + KeyTile::kBytes), half.first()),
        keys_at.stage() * Shapes::kKeyBytes,
        tile::RowDescriptor<QueryTile>(base(Shapes::kDoutOffset), 0),
        dout_at.stage() * QueryTile::kBytes);
  };
  const auto start_gradients = [&] {
    tile::start_register_product<Element, Shapes::kUniform>(
        dv, rounded_probs, tile::ColumnDescriptor<QueryTile>(base(Shapes::kDoutOffset)),
        dout_at.stage() * QueryTile::kBytes);
    tile::start_register_product<Element, Shapes::kUniform>(
        dk, rounded_dscores, tile::ColumnDescriptor<QueryTile>(base(Shapes::kQueryOffset)),
        query_at.stage() * QueryTile::kBytes);
  };
  const auto statistics = [&](int offset, int stage) {
    return reinterpret_cast<const float*>(shared + offset + stage * Shapes::kStatisticsBytes);
  };
  const auto await_turn = [&] { ptx::barrier_sync(Shapes::kTurnBarrier + consumer, 256); };
  const auto pass_turn = [&] { ptx::barrier_arrive(Shapes::kTurnBarrier + 1 - consumer, 256); };
  const auto await_query_tile = [&] {
    stages.query.wait_full(query_at);
    stages.dout.wait_full(dout_at);
  };
  // Waits for what the first step of a key tile reads, and returns where the tile lies.
  const auto await_tile = [&]() -> attention::TilePlace {
    stages.keys.wait_full(keys_at);
    const attention::TilePlace place = stages.places.get(keys_at.stage());
    half.advance();
    if (place.tile != kNoTile && Walk(attention, place).steps() > 0) {
      await_query_tile();
      if constexpr (Shapes::kSkipsHidden) {
        const Walk walk(attention, place);
        const attention::VisibleRange<Config> range(attention);
        if (walk.steps() > 1 && range.first_seeing(walk.first_key + Config::kTileK / 2) >=
                                    (walk.query_tiles.begin + 1) * Config::kTileQ)
          half.skip_hidden();
        if (half.skips_first()) {
          stages.dout.release(dout_at.stage());
          stages.query.release(query_at.stage());
          query_at.advance();
          dout_at.advance();
          await_query_tile();
        }
      }
    }
    return place;
  };

  // The first consumer starts first.
  if (consumer == 1) ptx::barrier_arrive(Shapes::kTurnBarrier, 256);

  attention::TilePlace next = await_tile();
  start_scores();
  start_dprobs();
#pragma unroll 1
  while (true) {
    const attention::TilePlace place = next;
    if (place.tile == kNoTile) break;
    const Walk walk(attention, place);
    dk.clear();
    dv.clear();
    KeptBits<Config, Scores> dropout;
    const auto tile_of = [&](const Step& step) {
      return ScoreTile{place.batch, step.head, step.query_tile * Config::kTileQ, walk.first_key,
                       walk.first_key + half.warp_row()};
    };
    const auto finish_scores = [&](const Step& step) {
      const ScoreTile tile = tile_of(step);
      make_probs<Config>(scores, attention, tile, lse);
      dropout.draw(attention, place.batch, step.head, tile.layout());
    };
    const auto finish_dprobs = [&](const Step& step) {
      const ScoreTile tile = tile_of(step);
      const attention::ScoreTransform<Config> transform(attention, place.batch, step.head);
#pragma unroll
      for (int n = 0; n < Scores::kColumnTiles; ++n)
        make_dscores<Config>(dprobs, n, scores.values[0][n], dropout, transform, tile.layout(),
                             attention.dropout_scale, delta.take(n),
                             statistics(Shapes::kLseOffset, query_at.stage()));
    };
    // Starts the first step of the next key tile; where there is none, with what lies there, and
    // nobody looks at it.
    const auto cross = [&] {
      keys_at.advance();
      next = await_tile();
      start_scores();
      ptx::wgmma_wait<1>();  // dv and dk
      start_dprobs();
      pass_turn();
    };

    int remaining = walk.steps();
    ptx::wgmma_wait<0>();
    if (remaining > 0) {
      Step step = walk.first();
      if (half.skips_first()) {
        walk.advance(step);
        --remaining;
      }
      lse.load(statistics(Shapes::kLseOffset, query_at.stage()));
      finish_scores(step);
      delta.load(statistics(Shapes::kDeltaOffset, dout_at.stage()));
#pragma unroll 1
      while (true) {
        round_probs<Config>(scores, dropout, rounded_probs);
        finish_dprobs(step);
        rounded_dscores.template pack<Element>(dprobs);

        await_turn();
        start_gradients();
        const auto query_before = query_at;
        const auto dout_before = dout_at;
        query_at.advance();
        dout_at.advance();
        if (--remaining == 0) break;
        stages.query.wait_full(query_at);
        start_scores();
        ptx::wgmma_wait<1>();  // dv and dk
        // Every thread has read lse and delta for itself.
        stages.dout.release(dout_before.stage());
        stages.query.release(query_before.stage());
        walk.advance(step);
        stages.dout.wait_full(dout_at);
        start_dprobs();
        pass_turn();
        lse.load(statistics(Shapes::kLseOffset, query_at.stage()));
        ptx::wgmma_wait<1>();  // scores
        finish_scores(step);
        delta.load(statistics(Shapes::kDeltaOffset, dout_at.stage()));
        ptx::wgmma_wait<0>();  // dprobs
      }
      cross();
      // Further than this tile's last step.
      const int skipped = half.skips_first() ? 1 : 0;
      stages.dout.release((dout_at.fills - 1 - skipped) % Config::kDoutStages);
      stages.query.release((query_at.fills - 1 - skipped) % Config::kQueryStages);
    } else {
      await_turn();
      cross();
    }
    // Where ptxas spills a register to keep the place, it is read once more.
    const int stage = (keys_at.fills - 1) % Shapes::kKeyStages;
    const attention::TilePlace done = Config::kAlibi ? place : stages.places.get(stage);
    stages.keys.release(stage);

    const bool finite = dk.is_finite() && dv.is_finite();
    dk.scale(attention.softmax_scale);
    if constexpr (Config::kDropout) dv.scale(attention.dropout_scale);
    store_key_gradient<Config>(backward.dk, dk, done, attention.seqlen_k, half.warp_row_before());
    store_key_gradient<Config>(backward.dv, dv, done, attention.seqlen_k, half.warp_row_before());
    if constexpr (Config::kWindowed) {
      if (__builtin_expect(__any_sync(0xffffffffu, !finite), false)) {
        __syncwarp();  // contain_dk_dv reads what other lanes have written
        const int first_key = done.tile * Config::kTileK + half.warp_row_before();
        attention::contain_dk_dv<Config>(backward, done.batch, done.head,
                                         {first_key, first_key + 16}, 1);
      }
    }
  }
  ptx::wgmma_wait<0>();
}

template <class Config>
__device__ __forceinline__ void key_gradient(const Sm90DealtBackwardParams& params,
                                             unsigned char* shared) {
  const KeyGradientStages<Config> stages(shared);
  if (threadIdx.x == 0) {
    stages.query.init(kBackwardConsumers * 128);
    stages.dout.init(kBackwardConsumers * 128);
    stages.keys.init(kBackwardConsumers * 128);
    stages.gate.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 0) {
    ptx::release_registers<kBackwardProducerRegisters>();
    const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp == StatisticsGate::kWarp) {
      stages.gate.open(params);
    } else if (warp == 0 && ptx::elect_lane()) {
      produce_key_gradient<Config>(params, stages);
    }
  } else {
    ptx::claim_registers<kBackwardConsumerRegisters>();
    consume_key_gradient<Config>(params, stages, shared, warpgroup - 1);
  }
}

}  // namespace jfa::sm90
