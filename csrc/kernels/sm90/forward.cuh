// Forward attention on Hopper: out = softmax(scale q k^T) v, tile by tile, and lse.
//
// One CTA stays on each multiprocessor and computes query tiles until there are none left. One warp
// (the producer) keeps the copy engine busy; two or three warpgroups (consumers) own 64 query rows
// each and all keys. A consumer starts q k^T of the next key tile before p v of this one and does
// the softmax of the next while p v runs; consumers start their products in turn, so that the
// softmax of one also runs beside the products of the others (FlashAttention-3, section 3). The
// last p v of a query tile and the first q k^T of the next start together, so that out is written
// while the tensor cores work.
//
//   ring       stages          filled with          released
//   query      kQueryStages    q of a query tile,   by each consumer thread, after the last q k^T
//                              and its place
//   key        kKeyStages      k of a key tile      by each consumer, after q k^T
//   value      kValueStages    v of a key tile      by each consumer, after p v
//
//   barrier             threads                  what it orders
//   1 + consumer        two consumers (256)      whose turn it is to start products
#pragma once

#include <attention/containment.cuh>
#include <attention/dropout.cuh>
#include <attention/head_address.cuh>
#include <attention/online_softmax.cuh>
#include <attention/score_layout.cuh>
#include <attention/score_transform.cuh>
#include <attention/tile_order.cuh>
#include <attention/visible_range.cuh>
#include <params/forward_params.h>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <tile/descriptor.cuh>
#include <tile/ring.cuh>
#include <tile/write_rows.cuh>

namespace jfa::sm90 {

constexpr int kConsumerRows = 64;
constexpr int kWarpRows = 16;
constexpr int kTurnBarrier = 1;

template <class Config>
struct ForwardShapes {
  static constexpr int kConsumers = Config::kTileQ / kConsumerRows;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  // Warpgroups share what the CTA was launched with, the same for each thread and a multiple of 8;
  // who claims more than the others have released waits forever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : kConsumers == 2 ? 24 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <=
                    (kConsumers + 1) * kLaunchRegisters,
                "there are no more registers");

  // Consumers still read the place of a tile whose q they have let go of, when the producer has
  // filled all query stages anew.
  static constexpr int kPlaces = 2 * Config::kQueryStages;

  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<Config::kTileK, Config::kHeadDim>;
  using QueryRing = tile::Ring<Config::kQueryStages>;
  using KeyRing = tile::Ring<Config::kKeyStages>;
  using ValueRing = tile::Ring<Config::kValueStages>;
  using QueryPosition = tile::RingPosition<Config::kQueryStages>;
  using KeyPosition = tile::RingPosition<Config::kKeyStages>;
  using ValuePosition = tile::RingPosition<Config::kValueStages>;

  static constexpr int kQueryOffset = 0;
  static constexpr int kKeyOffset = kQueryOffset + Config::kQueryStages * QueryTile::kBytes;
  static constexpr int kValueOffset = kKeyOffset + Config::kKeyStages * KeyTile::kBytes;
  static constexpr int kPlaceOffset = kValueOffset + Config::kValueStages * KeyTile::kBytes;
  static constexpr int kQueryRingOffset = kPlaceOffset + kPlaces * static_cast<int>(sizeof(int4));
  static constexpr int kKeyRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kValueRingOffset = kKeyRingOffset + KeyRing::kBytes;
  static constexpr int kSharedBytes = kValueRingOffset + ValueRing::kBytes;

  // Whether the first product of a query tile starts before the last out is written.
  static constexpr bool kAcrossTiles = Config::kQueryStages > 1;

  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kKeySteps = Config::kTileK / 16;
  using Scores = tile::Accumulator<1, kKeySteps>;
  using Out = tile::Accumulator<1, kHeadDimSteps>;
  using Probs = tile::RegisterOperand<1, kKeySteps>;
  using Layout = attention::ScoreLayout<16, 16>;
};

// What both roles see of the shared memory.
template <class Config>
struct ForwardStages {
  using Shapes = ForwardShapes<Config>;
  unsigned shared;
  int4* places;
  typename Shapes::QueryRing query;
  typename Shapes::KeyRing key;
  typename Shapes::ValueRing value;

  __device__ __forceinline__ explicit ForwardStages(unsigned char* shared_memory)
      : shared(tile::shared_address(shared_memory)),
        places(reinterpret_cast<int4*>(shared_memory + Shapes::kPlaceOffset)),
        query{shared + Shapes::kQueryRingOffset},
        key{shared + Shapes::kKeyRingOffset},
        value{shared + Shapes::kValueRingOffset} {}

  // Where a query tile lies. Divisions stand between the number of a CTA and its tile; the producer
  // has time for them.
  using Place = typename attention::TileOrder<Config>::Place;
  static constexpr int kNoTile = -1;  // there are no more
  __device__ __forceinline__ void put_place(const typename Shapes::QueryPosition& at,
                                            const Place& place) const {
    places[at.fills % Shapes::kPlaces] = make_int4(place.tile, place.head, place.batch, 0);
  }
  __device__ __forceinline__ Place place(const typename Shapes::QueryPosition& at) const {
    const int4 place = places[at.fills % Shapes::kPlaces];
    return {ptx::uniform(place.x), ptx::uniform(place.y), ptx::uniform(place.z)};
  }
};

// Starts the copies of all panels of a tile.
template <class Tile>
__device__ __forceinline__ void load_tile(unsigned shared, const TensorMap& map, unsigned barrier,
                                          unsigned long long cache_policy, int row, int head,
                                          int batch) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    ptx::tma_load(shared + panel * Tile::kPanelBytes, map, barrier, cache_policy,
                  panel * tile::kPanelColumns, row, head, batch);
}

// Threads: one.
template <class Config>
__device__ __forceinline__ void produce(const Sm90ForwardParams& params,
                                        const ForwardStages<Config>& stages) {
  using Shapes = ForwardShapes<Config>;
  using Stages = ForwardStages<Config>;
  using Place = typename Stages::Place;
  using KeyTile = typename Shapes::KeyTile;
  const AttentionParams& attention = params.forward.attention;
  const attention::VisibleRange<Config> range(attention);
  const int group = attention.heads / attention.heads_k;
  typename Shapes::QueryPosition query;
  typename Shapes::KeyPosition key;
  typename Shapes::ValuePosition value;
  attention::TileOrder<Config> order(params);
  const auto next_place = [&] {
    return order.valid() ? order.place() : Place{Stages::kNoTile, 0, 0};
  };
  // The keys of a query tile: which tiles, and where they lie. Worked out once for all of them:
  // what stands between the wait for a stage and its copy, all consumers wait for (docs/tuning.md).
  struct Keys {
    int first;  // key of the first tile
    int last;   // key of the last tile
    int head;
    int k_batch;
    int v_batch;
  };
  const auto keys_of = [&](const Place& place) -> Keys {
    const attention::Range tiles = range.key_tiles(place.tile * Config::kTileQ);
    return {tiles.begin * Config::kTileK, (tiles.end - 1) * Config::kTileK, place.head / group,
            attention::own_batch(place.batch, attention.k.batches),
            attention::own_batch(place.batch, attention.v.batches)};
  };
  const auto load_query = [&](const Place& place) {
    stages.query.await_empty(query);
    stages.put_place(query, place);
    if (place.tile == Stages::kNoTile) {
      stages.query.announce(query, 0);
      return;
    }
    stages.query.announce(query, Shapes::QueryTile::kBytes);
    load_tile<typename Shapes::QueryTile>(
        stages.shared + Shapes::kQueryOffset + query.stage() * Shapes::QueryTile::kBytes, params.q,
        stages.query.full(query.stage()), ptx::kEvictFirst, place.tile * Config::kTileQ, place.head,
        attention::own_batch(place.batch, attention.q.batches));
    query.advance();
  };
  const auto load_key = [&](const Keys& keys, int first_key) {
    stages.key.begin_fill(key, KeyTile::kBytes);
    load_tile<KeyTile>(stages.shared + Shapes::kKeyOffset + key.stage() * KeyTile::kBytes, params.k,
                       stages.key.full(key.stage()), ptx::kEvictLast, first_key, keys.head,
                       keys.k_batch);
    key.advance();
  };
  const auto load_value = [&](const Keys& keys, int first_key) {
    stages.value.begin_fill(value, KeyTile::kBytes);
    load_tile<KeyTile>(stages.shared + Shapes::kValueOffset + value.stage() * KeyTile::kBytes,
                       params.v, stages.value.full(value.stage()), ptx::kEvictLast, first_key,
                       keys.head, keys.v_batch);
    value.advance();
  };

  Place place = next_place();
  load_query(place);
  Keys keys = keys_of(place);
  const auto load_first_key = [&](const Place& of) {
    if (of.tile != Stages::kNoTile && keys.first <= keys.last) load_key(keys, keys.last);
  };
  load_first_key(place);
#pragma unroll 1
  while (place.tile != Stages::kNoTile) {
    order.advance();
    const Place next = next_place();
    if (Config::kQueryStages > 1) load_query(next);
#pragma unroll 1
    for (int first_key = keys.last; first_key >= keys.first; first_key -= Config::kTileK) {
      if (first_key > keys.first) load_key(keys, first_key - Config::kTileK);
      load_value(keys, first_key);
    }
    keys = keys_of(next);
    load_first_key(next);
    // The only stage is free when this tile's last key has been used.
    if (Config::kQueryStages == 1) load_query(next);
    place = next;
  }
}

// out and lse of the 16 rows of a warp.
// Threads: a whole warp.
template <class Config, class Out>
__device__ __forceinline__ void write_out(const ForwardParams& params,
                                          const typename attention::TileOrder<Config>::Place& place,
                                          Out& out, attention::OnlineSoftmax<1>& softmax,
                                          float exponent_scale, int warp_row) {
  const int first_query = place.tile * Config::kTileQ + warp_row;
  const int rows = params.attention.seqlen_q - first_query;
  float lse[1][2];
  softmax.finish(lse, exponent_scale);
  const int lane = ptx::reread_lane();
  float* const first_lse =
      params.lse +
      (static_cast<long long>(place.batch) * params.attention.heads + place.head) *
          params.attention.seqlen_q +
      first_query;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = softmax.sum[0][half];
    float inverse = total == 0.0f ? 0.0f : ptx::reciprocal_approx(total);
    if constexpr (Config::kDropout) inverse *= params.attention.dropout_scale;
#pragma unroll
    for (int n = 0; n < Out::kColumnTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) out.values[0][n][2 * half + c] *= inverse;
    const int row = lane / 4 + 8 * half;
    if (lane % 4 == 0 && row < rows) first_lse[row] = lse[0][half];
  }
  tile::write_rows<typename Config::Element, Config::kHeadDim>(
      attention::head_address(params.out, place.batch, place.head) +
          static_cast<long long>(first_query) * params.out.row_stride,
      params.out.row_stride, rows, out);
  if constexpr (Config::kWindowed) {
    if (__builtin_expect(__any_sync(0xffffffffu, !out.is_finite()), false)) {
      __syncwarp();  // contain_out reads what other lanes have written
      attention::contain_out<Config>(params, place.batch, place.head, place.tile * Config::kTileQ,
                                     {first_query, first_query + kWarpRows}, 1);
    }
  }
}

// Threads: a whole warpgroup.
template <class Config>
__device__ __forceinline__ void consume(const Sm90ForwardParams& params,
                                        const ForwardStages<Config>& stages, int consumer) {
  using Shapes = ForwardShapes<Config>;
  using Stages = ForwardStages<Config>;
  using Place = typename Stages::Place;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  const AttentionParams& attention = params.forward.attention;
  const attention::VisibleRange<Config> range(attention);

  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32);
  const int consumer_row = consumer * kConsumerRows;
  const int warp_row = consumer_row + warp * kWarpRows;
  const bool leads = threadIdx.x % 128 == 0;

  const tile::RowDescriptor<QueryTile> q_rows(stages.shared + Shapes::kQueryOffset, consumer_row);
  const tile::RowDescriptor<KeyTile> k_rows(stages.shared + Shapes::kKeyOffset, 0);
  const tile::ColumnDescriptor<KeyTile> v_columns(stages.shared + Shapes::kValueOffset);

  typename Shapes::Scores scores;
  typename Shapes::Out out;
  typename Shapes::QueryPosition query;
  typename Shapes::KeyPosition key;
  typename Shapes::ValuePosition value;
  const auto start_scores = [&] {
    tile::start_shared_product<Element, Shapes::kHeadDimSteps>(
        scores, q_rows, query.stage() * QueryTile::kBytes, k_rows, key.stage() * KeyTile::kBytes);
  };
  const auto release_key = [&] {
    if (leads) stages.key.release(key.stage());
    key.advance();
  };
  const auto release_value = [&] {
    if (leads) stages.value.release(value.stage());
    value.advance();
  };
  // The query position stays: it also says where the place of the tile is.
  const auto release_query = [&] { stages.query.release(query.stage()); };
  const auto await_turn = [&] {
    if (Shapes::kConsumers > 1) ptx::barrier_sync(kTurnBarrier + consumer, 256);
  };
  const auto pass_turn = [&] {
    if (Shapes::kConsumers > 1)
      ptx::barrier_arrive(kTurnBarrier + (consumer + 1) % Shapes::kConsumers, 256);
  };
  // Waits for what the first product of a query tile reads, and returns where the tile lies.
  const auto await_tile = [&]() -> Place {
    stages.query.wait_full(query);
    const Place place = stages.place(query);
    if (place.tile != Stages::kNoTile && !range.key_tiles(place.tile * Config::kTileQ).empty())
      stages.key.wait_full(key);
    return place;
  };

  // The first consumer starts first.
  if (Shapes::kConsumers > 1 && consumer == Shapes::kConsumers - 1)
    ptx::barrier_arrive(kTurnBarrier, 256);

  Place next;
  if (Shapes::kAcrossTiles) {
    next = await_tile();
    start_scores();
  }
#pragma unroll 1
  while (true) {
    if constexpr (!Shapes::kAcrossTiles) next = await_tile();
    const Place place = next;
    if (place.tile == Stages::kNoTile) break;
    const int first_query = place.tile * Config::kTileQ;
    const attention::Range key_tiles = range.key_tiles(first_query);
    const attention::ScoreTransform<Config> transform(attention, place.batch, place.head);

    out.clear();
    attention::OnlineSoftmax<1> softmax;

    using Probs = typename Shapes::Probs;
    const auto attend = [&](int key_tile, Probs& probs) {
      const int first_key = key_tile * Config::kTileK;
      const typename Shapes::Layout layout(first_query + warp_row, first_key);
      transform.apply(scores, layout);
      if (__builtin_expect(
              range.template cuts<kConsumerRows>(first_query + consumer_row, first_key), false))
        attention::mask_scores(scores, layout, attention::VisibleRange<Config>(attention));
      return softmax.template attend<!Config::kDropout>(
          scores, transform.exponent_scale, [&](int pair, float (&left)[4], float (&right)[4]) {
            if constexpr (Config::kDropout)
              attention::Dropout(attention, place.batch, place.head)
                  .for_pair(layout, 0, pair, [&](int side, int i, bool kept) {
                    if (!kept) (side == 0 ? left : right)[i] = 0.0f;
                  });
            probs.template pack_step<Element>(0, pair, left, right);
          });
    };
    const auto start_out = [&](const Probs& probs) {
      stages.value.wait_full(value);
      tile::start_register_product<Element>(out, probs, v_columns, value.stage() * KeyTile::kBytes);
    };
    // The probabilities of a key tile, while those of the one before meet their values.
    const auto step = [&](int key_tile, const Probs& before, Probs& probs) {
      constexpr bool kOverlap = Config::kProbBuffers == 2;
      stages.key.wait_full(key);
      await_turn();
      start_scores();
      start_out(before);
      pass_turn();
      ptx::wgmma_wait<kOverlap ? 1 : 0>();  // scores are there; with kOverlap, p v runs on
      release_key();
      if (key_tile == key_tiles.begin) release_query();
      if constexpr (!kOverlap) release_value();
      const auto rescale = attend(key_tile, probs);
      if constexpr (kOverlap) {
        ptx::wgmma_wait<0>();
        release_value();
      }
      rescale.apply(out);
    };
    // Ends the query tile, with its last p v if it has keys. Starts q k^T of the next, which runs
    // while out is written; where there is none, of what lies there, and nobody looks at it.
    const auto place_at = query;
    const auto cross = [&](auto start_last_out) {
      query.advance();
      if constexpr (Shapes::kAcrossTiles) {
        await_turn();
        start_last_out();
        next = await_tile();
        start_scores();
        pass_turn();
        ptx::wgmma_wait<1>();  // out is there
      } else {
        start_last_out();
        ptx::wgmma_wait<0>();
      }
    };
    const auto finish = [&](const Probs& probs) {
      cross([&] { start_out(probs); });
      release_value();
    };

    if constexpr (!Shapes::kAcrossTiles) start_scores();
    ptx::wgmma_wait<0>();
    if (key_tiles.end - key_tiles.begin < 2) release_query();
    if (!key_tiles.empty()) {
      release_key();
      Probs even;
      attend(key_tiles.end - 1, even);  // out is zero, at any scale
      int key_tile = key_tiles.end - 2;
      if constexpr (Config::kProbBuffers == 1) {
#pragma unroll 1
        for (; key_tile >= key_tiles.begin; --key_tile) step(key_tile, even, even);
        finish(even);
      } else {
        Probs odd;
#pragma unroll 1
        while (true) {
          if (key_tile < key_tiles.begin) {
            finish(even);
            break;
          }
          step(key_tile--, even, odd);
          if (key_tile < key_tiles.begin) {
            finish(odd);
            break;
          }
          step(key_tile--, odd, even);
        }
      }
    } else {
      cross([] {});
    }
    // Where the tile lies is read again: kept, it would take registers from the loop above.
    write_out<Config>(params.forward, stages.place(place_at), out, softmax,
                      transform.exponent_scale, warp_row);
  }
  if (Shapes::kAcrossTiles) ptx::wgmma_wait<0>();
}

template <class Config>
__device__ __forceinline__ void forward(const Sm90ForwardParams& params, unsigned char* shared) {
  using Shapes = ForwardShapes<Config>;
  const ForwardStages<Config> stages(shared);
  if (threadIdx.x == 0) {
    stages.query.init(Shapes::kConsumers * 128);
    stages.key.init(Shapes::kConsumers);
    stages.value.init(Shapes::kConsumers);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 0) {
    ptx::release_registers<Shapes::kProducerRegisters>();
    if (ptx::uniform(static_cast<int>(threadIdx.x) / 32) == 0 && ptx::elect_lane()) {
      ptx::prefetch_tensor_map(params.q);
      ptx::prefetch_tensor_map(params.k);
      ptx::prefetch_tensor_map(params.v);
      produce<Config>(params, stages);
    }
  } else {
    ptx::claim_registers<Shapes::kConsumerRegisters>();
    consume<Config>(params, stages, warpgroup - 1);
  }
}

}  // namespace jfa::sm90
