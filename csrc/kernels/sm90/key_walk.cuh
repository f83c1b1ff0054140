// What the kernels share whose CTAs own query tiles and walk the keys: roles, rings and producer.
//
// One CTA stays on each multiprocessor and computes query tiles until there are none left. One warp
// (the producer) keeps the copy engine busy; two or three warpgroups (consumers) own 64 query rows
// each and all keys.
//
//   ring    stages         filled with                               released
//   query   kQueryStages   a query tile's operands, and its place    by each consumer thread
//   key     kKeyStages     k of a key tile                           by each consumer
//   value   kValueStages   v of a key tile                           by each consumer
#pragma once

#include <attention/head_address.cuh>
#include <attention/tile_order.cuh>
#include <attention/visible_range.cuh>
#include <params/tensor_map.h>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <sm90/key_order.cuh>
#include <sm90/load_tile.cuh>
#include <sm90/tile_places.cuh>
#include <tile/ring.cuh>
#include <tile/shared_tile.cuh>

namespace jfa::sm90 {

constexpr int kConsumerRows = 64;
constexpr int kWarpRows = 16;

// kQueryOperands: tensors of which a query tile is fetched. kKeysKept: consumers use k of a key
// tile once more beside the next one's, and then need its v before further keys.
template <class Config, int kQueryOperandCount, bool kKeysKeptLonger>
struct KeyWalkShapes {
  static constexpr int kQueryOperands = kQueryOperandCount;
  static constexpr bool kKeysKept = kKeysKeptLonger;
  static constexpr int kConsumers = Config::kTileQ / kConsumerRows;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  // Warpgroups share what the CTA was launched with, the same for each thread and a multiple of 8;
  // who claims more than the others have released waits forever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : kConsumers == 2 ? 24 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;

  // Consumers still read the place of a tile whose operands they have let go of, when the producer
  // has filled all query stages anew.
  static constexpr int kPlaces = 2 * Config::kQueryStages;

  using Order = KeyOrder<Config, false>;
  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<Config::kTileK, Config::kHeadDim>;
  using QueryRing = tile::Ring<Config::kQueryStages>;
  using KeyRing = tile::Ring<Config::kKeyStages>;
  using ValueRing = tile::Ring<Config::kValueStages>;
  using QueryPosition = tile::RingPosition<Config::kQueryStages>;
  using KeyPosition = tile::RingPosition<Config::kKeyStages>;
  using ValuePosition = tile::RingPosition<Config::kValueStages>;

  static constexpr int kQueryBytes = kQueryOperands * QueryTile::kBytes;  // of a stage
  static constexpr int kQueryOffset = 0;
  static constexpr int kKeyOffset = kQueryOffset + Config::kQueryStages * kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + Config::kKeyStages * KeyTile::kBytes;
  static constexpr int kPlaceOffset = kValueOffset + Config::kValueStages * KeyTile::kBytes;
  static constexpr int kQueryRingOffset = kPlaceOffset + kPlaces * TilePlaces::kSlotBytes;
  static constexpr int kKeyRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kValueRingOffset = kKeyRingOffset + KeyRing::kBytes;
  static constexpr int kSharedBytes = kValueRingOffset + ValueRing::kBytes;
};

// What both roles see of the shared memory.
template <class Config, class ShapesOfKernel>
struct KeyWalkStages {
  using Shapes = ShapesOfKernel;
  unsigned shared;
  TilePlaces places;
  typename Shapes::QueryRing query;
  typename Shapes::KeyRing key;
  typename Shapes::ValueRing value;

  __device__ __forceinline__ explicit KeyWalkStages(unsigned char* shared_memory)
      : shared(tile::shared_address(shared_memory)),
        places(shared_memory + Shapes::kPlaceOffset),
        query{shared + Shapes::kQueryRingOffset},
        key{shared + Shapes::kKeyRingOffset},
        value{shared + Shapes::kValueRingOffset} {}

  // Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init() const {
    query.init(Shapes::kConsumers * 128);
    key.init(Shapes::kConsumers);
    value.init(Shapes::kConsumers);
    ptx::mbarrier_init_fence();
  }

  // Where the query tile of a fill lies.
  __device__ __forceinline__ attention::TilePlace place(
      const typename Shapes::QueryPosition& at) const {
    return places.get(at.fills % Shapes::kPlaces);
  }
};

// Turns of the consumers at starting products. Barrier 1 + consumer is that consumer's turn: it
// waits there, and who passes the turn arrives. Threads: a whole warpgroup.
template <int kConsumers>
struct ConsumerTurns {
  static constexpr int kBarrier = 1;
  static constexpr int kThreads = 2 * 128;
  int consumer;

  // The first consumer starts first: the last one passes it a turn that it never had.
  __device__ __forceinline__ void start() const {
    if (kConsumers > 1 && consumer == kConsumers - 1) ptx::barrier_arrive(kBarrier, kThreads);
  }
  __device__ __forceinline__ void await() const {
    if (kConsumers > 1) ptx::barrier_sync(kBarrier + consumer, kThreads);
  }
  __device__ __forceinline__ void pass() const {
    if (kConsumers > 1) ptx::barrier_arrive(kBarrier + (consumer + 1) % kConsumers, kThreads);
  }
};

// group: query heads that read one head of k and v. load_operands(shared, barrier, place) starts
// the copies of a query tile's operands. Threads: one.
template <class Config, class Shapes, class LoadOperands>
__device__ __forceinline__ void produce(const KeyWalkStages<Config, Shapes>& stages,
                                        const AttentionParams& attention, int group,
                                        const DealtTiles& tiles, const TensorMap& k,
                                        const TensorMap& v, LoadOperands load_operands) {
  using Place = attention::TilePlace;
  using KeyTile = typename Shapes::KeyTile;
  const attention::VisibleRange<Config> range(attention);
  typename Shapes::QueryPosition query;
  typename Shapes::KeyPosition key;
  typename Shapes::ValuePosition value;
  attention::TileOrder<Config> order(attention, tiles);
  // The keys of a query tile: which tiles, and where they lie. Worked out once for all of them:
  // what stands between the wait for a stage and its copy, all consumers wait for (docs/tuning.md).
  struct Keys {
    typename Shapes::Order order;
    int head;
    int k_batch;
    int v_batch;
  };
  const auto keys_of = [&](const Place& place) -> Keys {
    return {typename Shapes::Order(range.key_tiles(place.tile * Config::kTileQ)),
            place.head / group, attention::own_batch(place.batch, attention.k.batches),
            attention::own_batch(place.batch, attention.v.batches)};
  };
  const auto load_query = [&](const Place& place) {
    stages.query.await_empty(query);
    stages.places.put(query.fills % Shapes::kPlaces, place);
    if (place.tile == kNoTile) {
      stages.query.announce(query, 0);
      return;
    }
    stages.query.announce(query, Shapes::kQueryBytes);
    load_operands(stages.shared + Shapes::kQueryOffset + query.stage() * Shapes::kQueryBytes,
                  stages.query.full(query.stage()), place);
    query.advance();
  };
  const auto load_key = [&](const Keys& keys, int first_key) {
    stages.key.begin_fill(key, KeyTile::kBytes);
    load_tile<KeyTile>(stages.shared + Shapes::kKeyOffset + key.stage() * KeyTile::kBytes, k,
                       stages.key.full(key.stage()), ptx::kEvictLast, first_key, keys.head,
                       keys.k_batch);
    key.advance();
  };
  const auto load_value = [&](const Keys& keys, int first_key) {
    stages.value.begin_fill(value, KeyTile::kBytes);
    load_tile<KeyTile>(stages.shared + Shapes::kValueOffset + value.stage() * KeyTile::kBytes, v,
                       stages.value.full(value.stage()), ptx::kEvictLast, first_key, keys.head,
                       keys.v_batch);
    value.advance();
  };

  Place place = next_place(order);
  load_query(place);
  Keys keys = keys_of(place);
  const auto load_first_key = [&](const Place& of) {
    if (of.tile != kNoTile && keys.order.valid()) load_key(keys, keys.order.first_key());
  };
  load_first_key(place);
#pragma unroll 1
  while (place.tile != kNoTile) {
    order.advance();
    const Place next = next_place(order);
    if (Config::kQueryStages > 1) load_query(next);
#pragma unroll 1
    for (auto at = keys.order; at.valid(); at.advance()) {
      if (Shapes::kKeysKept) load_value(keys, at.first_key());
      if (at.has_next()) load_key(keys, at.next_key());
      if (!Shapes::kKeysKept) load_value(keys, at.first_key());
    }
    keys = keys_of(next);
    load_first_key(next);
    // The only stage is free when this tile's last key has been used.
    if (Config::kQueryStages == 1) load_query(next);
    place = next;
  }
}

// Divides a CTA into its producer, the three warps beside it, and its consumers. Threads: all of a
// CTA.
template <class Shapes, class Stages, class Produce, class Assist, class Consume>
__device__ __forceinline__ void run_key_walk(const Stages& stages, Produce produce, Assist assist,
                                             Consume consume) {
  static_assert(Shapes::kConsumers * Shapes::kConsumerRegisters + Shapes::kProducerRegisters <=
                    (Shapes::kConsumers + 1) * Shapes::kLaunchRegisters,
                "there are no more registers");
  if (threadIdx.x == 0) stages.init();
  __syncthreads();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 0) {
    ptx::release_registers<Shapes::kProducerRegisters>();
    const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp > 0) {
      assist(warp - 1);
    } else if (ptx::elect_lane()) {
      produce();
    }
  } else {
    ptx::claim_registers<Shapes::kConsumerRegisters>();
    consume(warpgroup - 1);
  }
}

}  // namespace jfa::sm90
