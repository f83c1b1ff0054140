// dk and dv on Hopper, by themselves, for head dims that leave no registers for both of 64 keys in
// one warpgroup (key_gradient.cuh has the formulas). One CTA stays on each multiprocessor and
// computes key tiles of 64 keys until there are none left. The two consumers part the work by what
// they compute, not by keys:
//
//   consumer of probs      scores^T, probs^T, dv
//   consumer of dscores    dprobs^T, dscores^T, dk
//
// They hold elements of scores^T and of dprobs^T in the same lanes, so probabilities go from one to
// the other through shared memory in any order, in fp32. The consumer of probs runs ahead, without
// a mask into the next key tile too.
//
// Two threads (producers) keep the copy engine busy. In a cluster the consumer of dscores also
// sends them to the CTA that computes dq (sm90/cluster_backward.cuh).
//
//   ring    stages        filled with                released
//   keys    1             k of a key tile, and its   by all threads of the consumer of probs, after
//                         place                      the last scores
//   values  1             v of a key tile, and its   by all threads of the consumer of dscores,
//                         place                      after the last dprobs
//   query   kQueryStages  q and lse of a query tile  by all threads of both consumers, after
//                                                    scores and after dk
//   dout    kDoutStages   dout and delta             by all threads of both consumers, after dv
//                                                    and after dprobs
//   probs   1             probabilities, by all      by all threads of the consumer of dscores
//                         threads of their consumer
//
//   barrier  threads               what it orders
//   1        both consumers (256)  with a mask: dk and dv of a key tile are written
#pragma once

#include <attention/tile_order.cuh>
#include <ptx/cluster.cuh>
#include <sm90/backward_steps.cuh>
#include <sm90/tile_places.cuh>

namespace jfa::sm90 {

template <class Config>
struct WideKeyGradientShapes {
  static_assert(Config::kTileQ == 64 && Config::kTileK == 64, "scores are one product");
  static_assert(Config::kQueryStages + Config::kDoutStages > 2,
                "each consumer would wait for the other to let go of the next step's stage");
  static constexpr int kProbsStages = 1;  // a second one is 1 to 2% slower (docs/tuning.md)
  static constexpr int kEndBarrier = 1;
  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kQuerySteps = Config::kTileQ / 16;

  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<Config::kTileK, Config::kHeadDim>;
  using Scores = tile::Accumulator<1, kQuerySteps>;
  using Operand = tile::RegisterOperand<1, kQuerySteps>;
  using Gradient = tile::Accumulator<1, kHeadDimSteps>;

  using QueryRing = tile::Ring<Config::kQueryStages>;
  using DoutRing = tile::Ring<Config::kDoutStages>;
  using KeyRing = tile::Ring<1>;
  using ValueRing = tile::Ring<1>;
  using ProbsRing = tile::Ring<kProbsStages>;
  using QueryPosition = tile::RingPosition<Config::kQueryStages>;
  using DoutPosition = tile::RingPosition<Config::kDoutStages>;
  using KeyPosition = tile::RingPosition<1>;
  using ProbsPosition = tile::RingPosition<kProbsStages>;
  static constexpr int kStatisticsBytes = Config::kTileQ * 4;
  static constexpr int kProbsBytes = Config::kTileQ * Config::kTileK * 4;  // of a stage

  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kQueryOffset = kValueOffset + KeyTile::kBytes;
  static constexpr int kDoutOffset = kQueryOffset + Config::kQueryStages * QueryTile::kBytes;
  static constexpr int kProbsOffset = kDoutOffset + Config::kDoutStages * QueryTile::kBytes;
  static constexpr int kLseOffset = kProbsOffset + kProbsStages * kProbsBytes;
  static constexpr int kDeltaOffset = kLseOffset + Config::kQueryStages * kStatisticsBytes;
  static constexpr int kPlaceOffset = kDeltaOffset + Config::kDoutStages * kStatisticsBytes;
  static constexpr int kQueryRingOffset =
      kPlaceOffset + kBackwardConsumers * TilePlaces::kSlotBytes;
  static constexpr int kDoutRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kKeyRingOffset = kDoutRingOffset + DoutRing::kBytes;
  static constexpr int kValueRingOffset = kKeyRingOffset + KeyRing::kBytes;
  static constexpr int kProbsRingOffset = kValueRingOffset + ValueRing::kBytes;
  static constexpr int kSharedBytes = kProbsRingOffset + ProbsRing::kBytes;
};

// What all roles see of the shared memory.
template <class Config>
struct WideKeyGradientStages : BackwardStages<WideKeyGradientShapes<Config>> {
  using Shapes = WideKeyGradientShapes<Config>;
  unsigned char* memory;
  TilePlaces places;  // a slot for each consumer: they are not in one key tile all the time
  typename Shapes::ValueRing values;
  typename Shapes::ProbsRing probs;

  __device__ __forceinline__ explicit WideKeyGradientStages(unsigned char* shared_memory)
      : BackwardStages<Shapes>(tile::shared_address(shared_memory)),
        memory(shared_memory),
        places(shared_memory + Shapes::kPlaceOffset),
        values{this->shared + Shapes::kValueRingOffset},
        probs{this->shared + Shapes::kProbsRingOffset} {}

  // Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init() const {
    this->query.init(kBackwardConsumers * 128);
    this->dout.init(kBackwardConsumers * 128);
    this->keys.init(128);
    values.init(128);
    probs.init(128, /*fillers=*/128);
    ptx::mbarrier_init_fence();
  }
};

// The walk of a key tile. In a cluster (sm90/cluster_backward.cuh) a tile may be none.
template <class Config>
struct WideKeyWalk : BackwardWalk<Config, false> {
  __device__ __forceinline__ WideKeyWalk(const AttentionParams& attention,
                                         const attention::TilePlace& place)
      : BackwardWalk<Config, false>(attention, place) {
    if constexpr (Config::kClusterCtas > 1)
      if (this->first_key >= attention.seqlen_k) this->query_tiles = {0, 0};
  }
};

// What a kernel does with dscores besides: nothing.
struct DscoresAlone {
  template <class Walk>
  __device__ __forceinline__ void begin(const Walk&) {}
  template <class Dscores, class Step>
  __device__ __forceinline__ void share(const Dscores&, const Step&) {}
  __device__ __forceinline__ void finish() {}
};

// Fetches what scores are made of, k and q, for the consumer of probs to begin with, or, for that
// of dscores, what dprobs are made of, v and dout. A thread does each: a stage of dout is free
// before the stage of q that one thread would wait for first. Threads: one.
template <class Config>
__device__ __forceinline__ void produce_wide_key_gradient(
    const Sm90DealtBackwardParams& params, const WideKeyGradientStages<Config>& stages,
    int consumer) {
  using Shapes = WideKeyGradientShapes<Config>;
  using Place = attention::TilePlace;
  using KeyTile = typename Shapes::KeyTile;
  using Walk = WideKeyWalk<Config>;
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;
  const BackwardStages<Shapes>& queries = stages;
  typename Shapes::KeyPosition keys_at;
  // k or v.
  const auto load_keys = [&](const Place& place) {
    const auto& ring = consumer == 0 ? stages.keys : stages.values;
    ring.await_empty(keys_at);
    stages.places.put(consumer, place);
    if (place.tile == kNoTile) {
      ring.announce(keys_at, 0);
      return;
    }
    ring.announce(keys_at, KeyTile::kBytes);
    const TensorView& view = consumer == 0 ? attention.k : attention.v;
    load_tile<KeyTile>(stages.shared + (consumer == 0 ? Shapes::kKeyOffset : Shapes::kValueOffset),
                       consumer == 0 ? params.k : params.v, ring.full(0), ptx::kEvictLast,
                       place.tile * Config::kTileK, attention::own_key_head(backward, place.head),
                       attention::own_batch(place.batch, view.batches));
    keys_at.advance();
  };
  // load(batch, map_batch, step) fetches a query tile of q or dout.
  const auto produce = [&](int map_batches, auto load) {
    attention::TileOrder<Config, /*kOfKeys=*/true, Config::kClusterCtas> order(attention,
                                                                               params.tiles);
#pragma unroll 1
    for (; order.valid(); order.advance()) {
      Place place = order.place();
      if constexpr (Config::kClusterCtas > 1)
        place.tile = place.tile * (Config::kClusterCtas - 1) + ptx::cluster_rank();
      const Walk walk(attention, place);
      const int map_batch = attention::own_batch(place.batch, map_batches);
      load_keys(place);
      typename Walk::Step step = walk.first();
#pragma unroll 1
      for (int remaining = walk.steps(); remaining > 0; --remaining) {
        load(place.batch, map_batch, step);
        walk.advance(step);
      }
    }
    load_keys({kNoTile, 0, 0});
  };
  ptx::await_previous_grid();  // of the statistics
  ptx::fence_async_proxy_global();
  if (consumer == 0) {
    typename Shapes::QueryPosition at;
    produce(attention.q.batches, [&](int batch, int map_batch, const typename Walk::Step& step) {
      load_query<Config>(queries, at, params.q, map_batch, backward, batch, step, [] {});
    });
  } else {
    typename Shapes::DoutPosition at;
    produce(backward.dout.batches, [&](int batch, int map_batch, const typename Walk::Step& step) {
      load_dout<Config>(queries, at, params.dout, map_batch, backward, batch, step);
    });
  }
}

// What both consumers have: the walk of a key tile, and positions in the rings.
template <class Config>
struct WideKeyConsumer {
  using Shapes = WideKeyGradientShapes<Config>;
  using Element = typename Config::Element;
  using Walk = WideKeyWalk<Config>;
  using Step = typename Walk::Step;

  const Sm90DealtBackwardParams& params;
  const WideKeyGradientStages<Config>& stages;
  int warp_row;
  typename Shapes::KeyPosition keys_at;
  typename Shapes::ProbsPosition probs_at;
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;

  __device__ __forceinline__ WideKeyConsumer(const Sm90DealtBackwardParams& kernel_params,
                                             const WideKeyGradientStages<Config>& shared_stages)
      : params(kernel_params),
        stages(shared_stages),
        warp_row(ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32) * 16) {}

  __device__ __forceinline__ const AttentionParams& attention() const {
    return params.backward.attention;
  }
  __device__ __forceinline__ ScoreTile tile_of(const Walk& walk, const Step& step) const {
    return {walk.place.batch, step.head, step.query_tile * Config::kTileQ, walk.first_key,
            walk.first_key + warp_row};
  }
  __device__ __forceinline__ const float* lse() const {
    return reinterpret_cast<const float*>(stages.memory + Shapes::kLseOffset +
                                          query_at.stage() * Shapes::kStatisticsBytes);
  }
  __device__ __forceinline__ const float* delta() const {
    return reinterpret_cast<const float*>(stages.memory + Shapes::kDeltaOffset +
                                          dout_at.stage() * Shapes::kStatisticsBytes);
  }
  // Where a thread leaves, or finds, column tile n of its probabilities.
  __device__ __forceinline__ float4& exchanged_probs(int n) const {
    return reinterpret_cast<float4*>(stages.memory + Shapes::kProbsOffset +
                                     probs_at.stage() *
                                         Shapes::kProbsBytes)[n * 128 + threadIdx.x % 128];
  }
  // For descriptors. Worked out anew at every use, or else the compiler keeps what follows in
  // registers.
  __device__ __forceinline__ unsigned base(int offset) const {
    const unsigned shared = ptx::opaque(stages.shared);
    return (Config::kClusterCtas > 1 ? ptx::shared_offset(shared) : shared) + offset;
  }
  __device__ __forceinline__ unsigned query() const {
    return query_at.stage() * Shapes::QueryTile::kBytes;
  }
  __device__ __forceinline__ unsigned dout() const {
    return dout_at.stage() * Shapes::QueryTile::kBytes;
  }
};

// dv of a key tile. Threads: a whole warpgroup.
template <class Config>
__device__ __forceinline__ void consume_probs(
    WideKeyConsumer<Config>& self, const WideKeyWalk<Config>& walk,
    typename WideKeyGradientShapes<Config>::Gradient& dv) {
  using Shapes = WideKeyGradientShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  const auto& stages = self.stages;

  typename Shapes::Scores scores;
  const auto start_scores = [&] {
    stages.query.wait_full(self.query_at);
    tile::start_shared_product<Element, Shapes::kHeadDimSteps>(
        scores, tile::RowDescriptor<KeyTile>(self.base(Shapes::kKeyOffset), 0), 0,
        tile::RowDescriptor<QueryTile>(self.base(Shapes::kQueryOffset), 0), self.query());
  };
  int remaining = walk.steps();
  if (remaining == 0) {
    stages.keys.release(0);
    return;
  }
  typename WideKeyConsumer<Config>::Step step = walk.first();
  start_scores();
#pragma unroll 1
  while (true) {
    const ScoreTile tile = self.tile_of(walk, step);
    ColumnStatistics<typename Shapes::Scores> lse;
    lse.load(self.lse());
    ptx::wgmma_wait<0>();
    if (remaining == 1) stages.keys.release(0);
    make_probs<Config>(scores, self.attention(), tile, lse);
    stages.query.release(self.query_at.stage());
    self.query_at.advance();
    stages.probs.await_empty(self.probs_at);
#pragma unroll
    for (int n = 0; n < Shapes::Scores::kColumnTiles; ++n)
      self.exchanged_probs(n) = make_float4(scores.values[0][n][0], scores.values[0][n][1],
                                            scores.values[0][n][2], scores.values[0][n][3]);
    stages.probs.finish_fill(self.probs_at);
    self.probs_at.advance();
    KeptBits<Config, typename Shapes::Scores> dropout;
    dropout.draw(self.attention(), tile.batch, tile.head, tile.layout());
    typename Shapes::Operand rounded_probs;
    round_probs<Config>(scores, dropout, rounded_probs);
    stages.dout.wait_full(self.dout_at);
    tile::start_register_product<Element>(
        dv, rounded_probs, tile::ColumnDescriptor<QueryTile>(self.base(Shapes::kDoutOffset)),
        self.dout());
    if (--remaining == 0) break;
    walk.advance(step);
    start_scores();
    ptx::wgmma_wait<1>();  // dv
    stages.dout.release(self.dout_at.stage());
    self.dout_at.advance();
  }
  ptx::wgmma_wait<0>();
  stages.dout.release(self.dout_at.stage());
  self.dout_at.advance();
}

// dk of a key tile. Threads: a whole warpgroup.
template <class Config, class Sharing>
__device__ __forceinline__ void consume_dscores(
    WideKeyConsumer<Config>& self, const WideKeyWalk<Config>& walk, Sharing& sharing,
    typename WideKeyGradientShapes<Config>::Gradient& dk) {
  using Shapes = WideKeyGradientShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  const auto& stages = self.stages;

  typename Shapes::Scores dprobs;
  const auto start_dprobs = [&] {
    stages.dout.wait_full(self.dout_at);
    tile::start_shared_product<Element, Shapes::kHeadDimSteps>(
        dprobs, tile::RowDescriptor<KeyTile>(self.base(Shapes::kValueOffset), 0), 0,
        tile::RowDescriptor<QueryTile>(self.base(Shapes::kDoutOffset), 0), self.dout());
  };
  int remaining = walk.steps();
  if (remaining == 0) {
    stages.values.release(0);
    return;
  }
  typename WideKeyConsumer<Config>::Step step = walk.first();
  typename Shapes::Operand rounded_dscores;
  start_dprobs();
#pragma unroll 1
  while (true) {
    const ScoreTile tile = self.tile_of(walk, step);
    const attention::ScoreTransform<Config> transform(self.attention(), tile.batch, tile.head);
    KeptBits<Config, typename Shapes::Scores> dropout;
    dropout.draw(self.attention(), tile.batch, tile.head, tile.layout());
    stages.query.wait_full(self.query_at);
    stages.probs.wait_full(self.probs_at);
    ptx::wgmma_wait<0>();
    if (remaining == 1) stages.values.release(0);
#pragma unroll
    for (int n = 0; n < Shapes::Scores::kColumnTiles; ++n) {
      const float4 exchanged = self.exchanged_probs(n);
      const float probs[4] = {exchanged.x, exchanged.y, exchanged.z, exchanged.w};
      make_dscores<Config>(dprobs, n, probs, dropout, transform, tile.layout(),
                           self.attention().dropout_scale, column_pair(self.delta(), n),
                           self.lse());
    }
    stages.probs.release(self.probs_at.stage());
    self.probs_at.advance();
    stages.dout.release(self.dout_at.stage());
    self.dout_at.advance();
    rounded_dscores.template pack<Element>(dprobs);
    tile::start_register_product<Element>(
        dk, rounded_dscores, tile::ColumnDescriptor<QueryTile>(self.base(Shapes::kQueryOffset)),
        self.query());
    if (--remaining == 0) break;
    start_dprobs();
    ptx::wgmma_wait<1>();  // dk
    stages.query.release(self.query_at.stage());
    self.query_at.advance();
    sharing.share(rounded_dscores, step);  // beside dprobs
    walk.advance(step);
  }
  ptx::wgmma_wait<0>();
  stages.query.release(self.query_at.stage());
  self.query_at.advance();
  sharing.share(rounded_dscores, step);
}

// Computes dv, or dk, of every key tile of this CTA. Threads: a whole warpgroup.
template <class Config, class Sharing>
__device__ __forceinline__ void consume_wide_key_gradient(
    const Sm90DealtBackwardParams& params, const WideKeyGradientStages<Config>& stages,
    int consumer, Sharing sharing) {
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;
  WideKeyConsumer<Config> self(params, stages);
  typename WideKeyGradientShapes<Config>::Gradient gradient;
#pragma unroll 1
  while (true) {
    if (consumer == 0)
      stages.keys.wait_full(self.keys_at);
    else
      stages.values.wait_full(self.keys_at);
    self.keys_at.advance();
    const attention::TilePlace place = stages.places.get(consumer);
    if (place.tile == kNoTile) break;
    const WideKeyWalk<Config> walk(attention, place);
    gradient.clear();
    if (consumer == 0) {
      consume_probs<Config>(self, walk, gradient);
    } else {
      sharing.begin(walk);
      consume_dscores<Config>(self, walk, sharing, gradient);
      sharing.finish();
    }
    const bool finite = gradient.is_finite();
    gradient.scale(consumer == 1      ? attention.softmax_scale
                   : Config::kDropout ? attention.dropout_scale
                                      : 1.0f);
    store_key_gradient<Config>(consumer == 0 ? backward.dv : backward.dk, gradient, place,
                               attention.seqlen_k, self.warp_row);
    if constexpr (Config::kWindowed) {
      // contain_dk_dv reads dk and dv of a key, which both consumers have written.
      if (ptx::barrier_any(WideKeyGradientShapes<Config>::kEndBarrier, kBackwardConsumers * 128,
                           !finite)) {
        const int first_key = place.tile * Config::kTileK;
        const int warp = static_cast<int>(threadIdx.x) / 32 - 4;
        attention::contain_dk_dv<Config>(backward, place.batch, place.head,
                                         {first_key + warp, first_key + Config::kTileK},
                                         kBackwardConsumers * 4);
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void wide_key_gradient(const Sm90DealtBackwardParams& params,
                                                  unsigned char* shared) {
  const WideKeyGradientStages<Config> stages(shared);
  if (threadIdx.x == 0) stages.init();
  __syncthreads();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 0) {
    ptx::release_registers<kBackwardProducerRegisters>();
    const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp < kBackwardConsumers && ptx::elect_lane())
      produce_wide_key_gradient<Config>(params, stages, warp);
  } else {
    ptx::claim_registers<kBackwardConsumerRegisters>();
    consume_wide_key_gradient<Config>(params, stages, warpgroup - 1, DscoresAlone());
  }
}

}  // namespace jfa::sm90
