// dq, dk and dv on Hopper for head dims above 128, by clusters of CTAs. Sums of dq do not fit
// beside those of dk and dv there, and to work out dscores twice, as the split form does, is two of
// seven products. So CTAs work together:
//
//   key CTAs   dk and dv of a tile of 64 keys each (sm90/wide_key_gradient.cuh)
//   dq CTA     dscores k of a query tile and all their keys, from dscores that they send it
//
// The dq CTA so computes 3 products of the cluster's 15. What it adds to memory is summed over the
// keys of all key CTAs. Every step of the walk of a group of key tiles has dscores of each key CTA,
// zeros where its keys are not seen.
//
//   ring of     stages    filled with                      released
//   the dq CTA
//   keys        1         k of the group, and its place    by all threads of consumers and
//                                                          senders, after the last dq
//   dscores     2         dscores of all key CTAs          by all threads of consumers, after dq
//   sums        1 for     dq of its columns, by all        by the sender, when they are read
//               each      threads of a consumer
//               consumer
//   key CTAs
//   sent        2         dscores on their way, without    by each warp of the dq CTA's
//                         a barrier                        consumers, after dq
//
//   barrier  threads                    what it orders
//   1        see wide_key_gradient.cuh
//   2        consumer of dscores (128)  dscores are there to be sent
//
// Barriers and stages lie in the same place in every CTA, so that each finds those of the others.
#pragma once

#include <ptx/cluster.cuh>
#include <sm90/wide_key_gradient.cuh>

namespace jfa::sm90 {

template <class Config>
struct ClusterBackwardShapes : WideKeyGradientShapes<Config> {
  using KeyCta = WideKeyGradientShapes<Config>;
  static constexpr int kKeyCtas = Config::kClusterCtas - 1;
  static constexpr int kQueryCta = kKeyCtas;  // its rank
  static constexpr int kDscoresStages = 2;
  static constexpr int kSentBarrier = 2;
  static constexpr int kKeySteps = Config::kTileK / 16;
  static constexpr int kUsingWarps = kBackwardConsumers * 4;  // of the dq CTA

  using DscoresTile = tile::SharedTile<Config::kTileQ, Config::kTileK>;
  using DscoresRing = tile::Ring<kDscoresStages>;
  using DscoresPosition = tile::RingPosition<kDscoresStages>;
  using SumsRing = tile::Ring<1>;
  using SumsPosition = tile::RingPosition<1>;

  // Of dq, the first consumer computes two panels of columns and the second one the others.
  static constexpr int kSplitSteps = 8;
  static_assert(KeyCta::kHeadDimSteps > kSplitSteps, "a consumer has columns of its own");
  static __device__ constexpr int query_gradient_steps(int consumer) {
    return consumer == 0 ? kSplitSteps : KeyCta::kHeadDimSteps - kSplitSteps;
  }
  static __device__ constexpr int query_gradient_offset(int consumer) {
    return consumer * Config::kTileQ * 16 * kSplitSteps;
  }
  template <int kConsumer>
  using QueryGradient = tile::Accumulator<1, query_gradient_steps(kConsumer)>;

  // The dq CTA, whose shared memory begins with the keys.
  static constexpr int kReceivedOffset = kKeyCtas * KeyCta::KeyTile::kBytes;
  static constexpr int kReceivedBytes = kKeyCtas * DscoresTile::kBytes;  // of a stage
  static constexpr int kSumsOffset = kReceivedOffset + kDscoresStages * kReceivedBytes;
  static constexpr int kSumsBytes =
      Config::kTileQ * 16 * KeyCta::kHeadDimSteps * static_cast<int>(sizeof(float));
  // A key CTA.
  static constexpr int kSentOffset = (KeyCta::kSharedBytes + 1023) / 1024 * 1024;
  static constexpr int kSentEnd = kSentOffset + kDscoresStages * DscoresTile::kBytes;
  // Both: a barrier has the same place in every CTA.
  static constexpr int kSumsEnd = kSumsOffset + kSumsBytes;
  static constexpr int kSentRingOffset = kSentEnd > kSumsEnd ? kSentEnd : kSumsEnd;
  static constexpr int kDscoresRingOffset = kSentRingOffset + DscoresRing::kBytes;
  static constexpr int kGroupRingOffset = kDscoresRingOffset + DscoresRing::kBytes;
  static constexpr int kSumsRingOffset = kGroupRingOffset + KeyCta::KeyRing::kBytes;
  static constexpr int kGroupPlaceOffset = kSumsRingOffset + kBackwardConsumers * SumsRing::kBytes;
  static constexpr int kSharedBytes = kGroupPlaceOffset + TilePlaces::kSlotBytes;
};

// The walk of a group of key tiles, one of each key CTA: all query tiles that see one of them.
template <class Config>
struct GroupWalk {
  static constexpr int kKeyCtas = Config::kClusterCtas - 1;
  attention::TilePlace place;  // tile is the group's, head the key head
  int group;
  attention::Range query_tiles{0, 0};

  __device__ __forceinline__ GroupWalk(const AttentionParams& attention,
                                       const attention::TilePlace& group_place)
      : place(group_place), group(attention::group_heads<Config>(attention)) {
#pragma unroll
    for (int rank = 0; rank < kKeyCtas; ++rank) {
      const WideKeyWalk<Config> walk(attention,
                                     {place.tile * kKeyCtas + rank, place.head, place.batch});
      if (walk.query_tiles.empty()) continue;
      if (query_tiles.empty()) query_tiles = walk.query_tiles;
      query_tiles = {min(query_tiles.begin, walk.query_tiles.begin),
                     max(query_tiles.end, walk.query_tiles.end)};
    }
  }

  using Step = typename WideKeyWalk<Config>::Step;
  __device__ __forceinline__ int head_steps() const { return query_tiles.end - query_tiles.begin; }
  __device__ __forceinline__ int steps() const { return group * head_steps(); }
  __device__ __forceinline__ Step first() const { return {place.head * group, query_tiles.begin}; }
  __device__ __forceinline__ void advance(Step& step) const {
    if (++step.query_tile < query_tiles.end) return;
    step.query_tile = query_tiles.begin;
    ++step.head;
  }
  // Which of its steps one is.
  __device__ __forceinline__ int number(const Step& step) const {
    return (step.head - place.head * group) * head_steps() + step.query_tile - query_tiles.begin;
  }
};

// What the dq CTA's roles see of its shared memory.
template <class Config>
struct QueryCtaStages {
  using Shapes = ClusterBackwardShapes<Config>;
  unsigned char* memory;
  unsigned shared;
  TilePlaces places;
  typename Shapes::KeyRing keys;
  typename Shapes::DscoresRing dscores;

  __device__ __forceinline__ explicit QueryCtaStages(unsigned char* shared_memory)
      : memory(shared_memory),
        shared(tile::shared_address(shared_memory)),
        places(shared_memory + Shapes::kGroupPlaceOffset),
        keys{shared + Shapes::kGroupRingOffset},
        dscores{shared + Shapes::kDscoresRingOffset} {}

  // Threads: one, before a barrier of the cluster.
  __device__ __forceinline__ void init() const {
    keys.init(kBackwardConsumers * 129);
    dscores.init(kBackwardConsumers * 128);
    for (int consumer = 0; consumer < kBackwardConsumers; ++consumer)
      sums(consumer).init(1, /*fillers=*/128);
    ptx::mbarrier_init_fence();
  }
  __device__ __forceinline__ typename Shapes::SumsRing sums(int consumer) const {
    return {shared + Shapes::kSumsRingOffset + consumer * Shapes::SumsRing::kBytes};
  }
  // Where a consumer stages its part of dq.
  __device__ __forceinline__ unsigned char* staged_sums(int consumer) const {
    return memory + Shapes::kSumsOffset +
           Shapes::query_gradient_offset(consumer) * static_cast<int>(sizeof(float));
  }
};

// Sends dscores of a key CTA to the dq CTA. Threads: the consumer of dscores.
template <class Config>
struct DscoresSender {
  using Shapes = ClusterBackwardShapes<Config>;
  using DscoresTile = typename Shapes::DscoresTile;
  const AttentionParams& attention;
  unsigned char* memory;
  unsigned shared;
  typename Shapes::DscoresRing ring;
  typename Shapes::DscoresPosition at;
  GroupWalk<Config> walk;
  int sent = 0;  // steps of the walk

  __device__ __forceinline__ DscoresSender(const AttentionParams& params,
                                           unsigned char* shared_memory)
      : attention(params),
        memory(shared_memory),
        shared(tile::shared_address(shared_memory)),
        ring{shared + Shapes::kSentRingOffset},
        walk(params, {0, 0, 0}) {}

  __device__ __forceinline__ void begin(const WideKeyWalk<Config>& key_walk) {
    walk = GroupWalk<Config>(attention, {key_walk.place.tile / Shapes::kKeyCtas,
                                         key_walk.place.head, key_walk.place.batch});
    sent = 0;
  }
  template <class Dscores, class Step>
  __device__ __forceinline__ void share(const Dscores& dscores, const Step& step) {
    send_zeros(walk.number(step));
    send([&](unsigned target) {
      tile::store_transposed<DscoresTile>(target, dscores,
                                          static_cast<int>(threadIdx.x) % 128 / 32);
    });
  }
  __device__ __forceinline__ void finish() { send_zeros(walk.steps()); }

 private:
  // Up to that step.
  __device__ __forceinline__ void send_zeros(int end) {
#pragma unroll 1
    while (sent < end)
      send([&](unsigned) {
        float4* const target = reinterpret_cast<float4*>(memory + Shapes::kSentOffset +
                                                         at.stage() * DscoresTile::kBytes);
#pragma unroll
        for (int chunk = 0; chunk < DscoresTile::kBytes / 16; chunk += 128)
          target[chunk + threadIdx.x % 128] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      });
  }
  template <class Store>
  __device__ __forceinline__ void send(Store store) {
    ring.await_empty(at);
    const unsigned source =
        ptx::opaque(shared) + Shapes::kSentOffset + at.stage() * DscoresTile::kBytes;
    store(source);
    ptx::fence_async_proxy();
    ptx::barrier_sync(Shapes::kSentBarrier, 128);
    if (threadIdx.x % 128 / 32 == 0 && ptx::elect_lane()) {
      const unsigned target = shared + Shapes::kReceivedOffset +
                              at.stage() * Shapes::kReceivedBytes +
                              ptx::cluster_rank() * DscoresTile::kBytes;
      const unsigned barrier =
          typename Shapes::DscoresRing{shared + Shapes::kDscoresRingOffset}.full(at.stage());
      ptx::bulk_copy_remote(ptx::shared_of_cta(target, Shapes::kQueryCta), source,
                            DscoresTile::kBytes, ptx::shared_of_cta(barrier, Shapes::kQueryCta));
    }
    at.advance();
    ++sent;
  }
};

// Fetches k of every group, and announces what key CTAs will send. Threads: one.
template <class Config>
__device__ __forceinline__ void produce_group_keys(const Sm90DealtBackwardParams& params,
                                                   const QueryCtaStages<Config>& stages) {
  using Shapes = ClusterBackwardShapes<Config>;
  using KeyTile = typename Shapes::KeyTile;
  using Place = attention::TilePlace;
  const AttentionParams& attention = params.backward.attention;
  attention::TileOrder<Config, /*kOfKeys=*/true, Config::kClusterCtas> order(attention,
                                                                             params.tiles);
  typename Shapes::KeyPosition keys_at;
  typename Shapes::DscoresPosition dscores_at;
#pragma unroll 1
  for (; order.valid(); order.advance()) {
    const Place place = order.place();
    stages.keys.await_empty(keys_at);
    stages.places.put(0, place);
    stages.keys.announce(keys_at, Shapes::kKeyCtas * KeyTile::kBytes);
    for (int rank = 0; rank < Shapes::kKeyCtas; ++rank)
      load_tile<KeyTile>(stages.shared + rank * KeyTile::kBytes, params.k, stages.keys.full(0),
                         ptx::kEvictLast, (place.tile * Shapes::kKeyCtas + rank) * Config::kTileK,
                         attention::own_key_head(params.backward, place.head),
                         attention::own_batch(place.batch, attention.k.batches));
    keys_at.advance();
#pragma unroll 1
    for (int remaining = GroupWalk<Config>(attention, place).steps(); remaining > 0; --remaining) {
      stages.dscores.begin_fill(dscores_at, Shapes::kReceivedBytes);
      dscores_at.advance();
    }
  }
  stages.keys.await_empty(keys_at);
  stages.places.put(0, {kNoTile, 0, 0});
  stages.keys.announce(keys_at, 0);
}

// use(walk) for every group of the dq CTA.
template <class Config, class Use>
__device__ __forceinline__ void for_each_group(const Sm90DealtBackwardParams& params,
                                               const QueryCtaStages<Config>& stages, Use use) {
  typename ClusterBackwardShapes<Config>::KeyPosition keys_at;
#pragma unroll 1
  while (true) {
    stages.keys.wait_full(keys_at);
    const attention::TilePlace place = stages.places.read(0);
    if (place.tile == kNoTile) break;
    use(GroupWalk<Config>(params.backward.attention, place));
    stages.keys.release(0);
    keys_at.advance();
  }
}

// Threads: a whole warpgroup.
template <class Config, int kConsumer>
__device__ __forceinline__ void consume_sent_dscores(const Sm90DealtBackwardParams& params,
                                                     const QueryCtaStages<Config>& stages) {
  using Shapes = ClusterBackwardShapes<Config>;
  using Element = typename Config::Element;
  using KeyTile = typename Shapes::KeyTile;
  using DscoresTile = typename Shapes::DscoresTile;
  using QueryGradient = typename Shapes::template QueryGradient<kConsumer>;
  const typename Shapes::DscoresRing sent{stages.shared + Shapes::kSentRingOffset};
  const auto sums = stages.sums(kConsumer);
  const unsigned base = ptx::shared_offset(stages.shared);  // for descriptors
  typename Shapes::DscoresPosition at;
  typename Shapes::SumsPosition sums_at;
  QueryGradient dq;
  for_each_group(params, stages, [&](const GroupWalk<Config>& walk) {
#pragma unroll 1
    for (int remaining = walk.steps(); remaining > 0; --remaining) {
      stages.dscores.wait_full(at);
#pragma unroll
      for (int rank = 0; rank < Shapes::kKeyCtas; ++rank)
        tile::start_shared_product<Element, Shapes::kKeySteps>(
            dq,
            tile::RowDescriptor<DscoresTile>(
                base + Shapes::kReceivedOffset + rank * DscoresTile::kBytes, 0),
            at.stage() * Shapes::kReceivedBytes,
            tile::ColumnDescriptor<KeyTile>(base + rank * KeyTile::kBytes +
                                            kConsumer * Shapes::kSplitSteps / 4 *
                                                KeyTile::kPanelBytes),
            0, /*onto=*/rank > 0);
      ptx::wgmma_wait<0>();
      stages.dscores.release(at.stage());
      __syncwarp();  // all lanes' products have ended
      const int lane = ptx::reread_lane();
      if (lane < Shapes::kKeyCtas)
        ptx::mbarrier_arrive_remote(ptx::shared_of_cta(sent.empty(at.stage()), lane));
      at.advance();
      sums.await_empty(sums_at);
      tile::BulkAccumulator<QueryGradient>::stage(dq, stages.staged_sums(kConsumer));
      ptx::fence_async_proxy();
      sums.finish_fill(sums_at);
      sums_at.advance();
    }
  });
}

// Adds a consumer's part of dq to the sums in memory. Threads: one.
template <class Config, int kConsumer>
__device__ __forceinline__ void send_query_gradient(const Sm90DealtBackwardParams& params,
                                                    const QueryCtaStages<Config>& stages) {
  using Shapes = ClusterBackwardShapes<Config>;
  using Accumulator = tile::BulkAccumulator<typename Shapes::template QueryGradient<kConsumer>>;
  const BackwardParams& backward = params.backward;
  const auto sums = stages.sums(kConsumer);
  typename Shapes::SumsPosition at;
  ptx::await_previous_grid();  // which has cleared them
  ptx::fence_async_proxy_global();
  for_each_group(params, stages, [&](const GroupWalk<Config>& walk) {
    typename GroupWalk<Config>::Step step = walk.first();
#pragma unroll 1
    for (int remaining = walk.steps(); remaining > 0; --remaining) {
      sums.wait_full(at);
      const long long row = attention::workspace_row(backward, walk.place.batch, step.head,
                                                     step.query_tile * Config::kTileQ);
      Accumulator{backward.dq_accum + row * backward.padded_columns +
                  Shapes::query_gradient_offset(kConsumer)}
          .send(stages.staged_sums(kConsumer));
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      sums.release(0);
      at.advance();
      walk.advance(step);
    }
  });
  ptx::bulk_wait();
}

template <class Config>
__device__ __forceinline__ void cluster_backward(const Sm90DealtBackwardParams& params,
                                                 unsigned char* shared) {
  using Shapes = ClusterBackwardShapes<Config>;
  ptx::start_next_grid();
  const bool is_query_cta = ptx::cluster_rank() == Shapes::kQueryCta;
  const WideKeyGradientStages<Config> key_stages(shared);
  const QueryCtaStages<Config> query_stages(shared);
  const typename Shapes::DscoresRing sent{query_stages.shared + Shapes::kSentRingOffset};
  if (threadIdx.x == 0) {
    if (is_query_cta) {
      query_stages.init();
    } else {
      sent.init(Shapes::kUsingWarps);
      key_stages.init();
    }
  }
  ptx::cluster_barrier();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
  if (warpgroup == 0) {
    ptx::release_registers<kBackwardProducerRegisters>();
    if (ptx::elect_lane()) {
      if (!is_query_cta) {
        if (warp < kBackwardConsumers) produce_wide_key_gradient<Config>(params, key_stages, warp);
      } else if (warp == 0) {
        produce_group_keys<Config>(params, query_stages);
      } else if (warp == 1) {
        send_query_gradient<Config, 0>(params, query_stages);
      } else if (warp == 2) {
        send_query_gradient<Config, 1>(params, query_stages);
      }
    }
  } else {
    ptx::claim_registers<kBackwardConsumerRegisters>();
    if (!is_query_cta) {
      consume_wide_key_gradient<Config>(params, key_stages, warpgroup - 1,
                                        DscoresSender<Config>(params.backward.attention, shared));
    } else if (warpgroup == 1) {
      consume_sent_dscores<Config, 0>(params, query_stages);
    } else {
      consume_sent_dscores<Config, 1>(params, query_stages);
    }
  }
  ptx::cluster_barrier();  // others may still reach into this CTA's shared memory
}

// What dq of a query tile was summed over: whole groups of key tiles.
template <class Config>
struct GroupConfig : Config {
  static constexpr int kTileK = (Config::kClusterCtas - 1) * Config::kTileK;
};

// dq = scale * its fp32 sums, rounded. One CTA serves one query tile of one head; its two halves
// read the parts of the two consumers.
template <class Config>
__device__ __forceinline__ void cluster_backward_postprocess(const BackwardParams& params,
                                                             unsigned char* shared) {
  using Shapes = ClusterBackwardShapes<Config>;
  ptx::await_previous_grid();
  const int query_tiles = (params.attention.seqlen_q + Config::kTileQ - 1) / Config::kTileQ;
  const QueryGradientTile<GroupConfig<Config>, typename Shapes::QueryTile> tile(
      params, attention::place_of(blockIdx.x, query_tiles, params.attention.heads));
  bool finite = true;
  if (threadIdx.x < 128) {
    finite = tile.stage(typename Shapes::template QueryGradient<0>(), 0, 0, 0, shared);
  } else {
    finite = tile.stage(typename Shapes::template QueryGradient<1>(),
                        Shapes::query_gradient_offset(1), 0, Shapes::kSplitSteps, shared);
  }
  tile.store(finite, shared);
}

}  // namespace jfa::sm90
