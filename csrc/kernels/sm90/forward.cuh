// Forward attention on Hopper: out = softmax(scale q k^T) v, tile by tile, and lse.
//
// One CTA stays on each multiprocessor and computes query tiles until there are none left. One warp
// (the producer) keeps the copy engine busy; two or three warpgroups (consumers) own 64 query rows
// each and all keys. A consumer starts q k^T of the next key tile before p v of this one and does
// the softmax of the next while p v runs; consumers start their products in turn, so that the
// softmax of one also runs beside the products of the others (FlashAttention-3, section 3).
//
//   ring       stages          filled with          released
//   query      kQueryStages    q of a query tile    by each consumer warp, when the copy of its 16
//                                                   rows of out, staged there, has been read
//   key        kKeyStages      k of a key tile      by each consumer, after q k^T
//   value      kValueStages    v of a key tile      by each consumer, after p v
//
//   barrier             threads                  what it orders
//   1 + consumer        two consumers (256)      whose turn it is to start products
//   5 + consumer        one consumer (128)       all warps are done with q before out is staged in
//                                                its place
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

namespace jfa::sm90 {

constexpr int kConsumerRows = 64;
constexpr int kWarpRows = 16;
constexpr int kTurnBarrier = 1;
constexpr int kStagingBarrier = 5;

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
  static constexpr int kQueryRingOffset = kValueOffset + Config::kValueStages * KeyTile::kBytes;
  static constexpr int kKeyRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kValueRingOffset = kKeyRingOffset + KeyRing::kBytes;
  static constexpr int kSharedBytes = kValueRingOffset + ValueRing::kBytes;

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
  typename Shapes::QueryRing query;
  typename Shapes::KeyRing key;
  typename Shapes::ValueRing value;

  __device__ __forceinline__ explicit ForwardStages(unsigned shared_address)
      : shared(shared_address),
        query{shared_address + Shapes::kQueryRingOffset},
        key{shared_address + Shapes::kKeyRingOffset},
        value{shared_address + Shapes::kValueRingOffset} {}
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
  using KeyTile = typename Shapes::KeyTile;
  const AttentionParams& attention = params.forward.attention;
  const attention::VisibleRange<Config> range(attention);
  const int group = attention.heads / attention.heads_k;
  typename Shapes::QueryPosition query;
  typename Shapes::KeyPosition key;
  typename Shapes::ValuePosition value;
#pragma unroll 1
  for (attention::TileOrder<Config> order(params); order.valid(); order.advance()) {
    const auto place = order.place();
    const attention::Range key_tiles = range.key_tiles(place.tile * Config::kTileQ);
    const auto load_key = [&](int key_tile) {
      stages.key.begin_fill(key, KeyTile::kBytes);
      load_tile<KeyTile>(stages.shared + Shapes::kKeyOffset + key.stage * KeyTile::kBytes, params.k,
                         stages.key.full(key.stage), ptx::kEvictLast, key_tile * Config::kTileK,
                         place.head / group, place.batch % attention.k.batches);
      key.advance();
    };
    const auto load_value = [&](int key_tile) {
      stages.value.begin_fill(value, KeyTile::kBytes);
      load_tile<KeyTile>(stages.shared + Shapes::kValueOffset + value.stage * KeyTile::kBytes,
                         params.v, stages.value.full(value.stage), ptx::kEvictLast,
                         key_tile * Config::kTileK, place.head / group,
                         place.batch % attention.v.batches);
      value.advance();
    };
    // The first key tile does not depend on a query stage, which is the last thing that the
    // consumers let go of.
    if (!key_tiles.empty()) load_key(key_tiles.end - 1);
    stages.query.begin_fill(query, Shapes::QueryTile::kBytes);
    load_tile<typename Shapes::QueryTile>(
        stages.shared + Shapes::kQueryOffset + query.stage * Shapes::QueryTile::kBytes, params.q,
        stages.query.full(query.stage), ptx::kEvictFirst, place.tile * Config::kTileQ, place.head,
        place.batch % attention.q.batches);
    query.advance();
#pragma unroll 1
    for (int key_tile = key_tiles.end - 1; key_tile >= key_tiles.begin; --key_tile) {
      if (key_tile > key_tiles.begin) load_key(key_tile - 1);
      load_value(key_tile);
    }
  }
}

// out rows of a warp, rounded, staged in the place of its q rows and sent off; and lse.
template <class Config, class Out>
__device__ __forceinline__ void write_rows(
    const Sm90ForwardParams& params, const typename attention::TileOrder<Config>::Place& place,
    unsigned staging, Out& out, attention::OnlineSoftmax<1>& softmax, float exponent_scale,
    int warp_row) {
  using Shapes = ForwardShapes<Config>;
  using QueryTile = typename Shapes::QueryTile;
  const ForwardParams& forward = params.forward;
  const int lane = ptx::reread_lane();
  const int first_query = place.tile * Config::kTileQ + warp_row;
  float lse[1][2];
  softmax.finish(lse, exponent_scale);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = softmax.sum[0][half];
    float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    if constexpr (Config::kDropout) inverse *= forward.attention.dropout_scale;
#pragma unroll
    for (int n = 0; n < Out::kColumnTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) out.values[0][n][2 * half + c] *= inverse;
    const int query = first_query + lane / 4 + 8 * half;
    if (lane % 4 == 0 && query < forward.attention.seqlen_q) {
      const long long row =
          static_cast<long long>(place.batch) * forward.attention.heads + place.head;
      forward.lse[row * forward.attention.seqlen_q + query] = lse[0][half];
    }
  }
  const bool spoilt = Config::kWindowed && !out.is_finite();
  ptx::barrier_sync(kStagingBarrier + warp_row / kConsumerRows, 128);  // q is read
  tile::store_accumulator<typename Config::Element, QueryTile, 16, 1>(staging, 0, out, warp_row, 0);
  ptx::fence_async_proxy();
  __syncwarp();  // all lanes have staged their part of the warp's rows
  if (ptx::elect_lane()) {
#pragma unroll
    for (int panel = 0; panel < QueryTile::kPanels; ++panel)
      ptx::tma_store(params.out,
                     staging + panel * QueryTile::kPanelBytes + warp_row * tile::kPanelRowBytes,
                     panel * tile::kPanelColumns, first_query, place.head, place.batch);
    ptx::bulk_commit();
  }
  if constexpr (Config::kWindowed) {
    if (__builtin_expect(__any_sync(0xffffffffu, spoilt), false)) {
      if (ptx::elect_lane()) ptx::bulk_wait();
      __syncwarp();  // contain_out reads what the copy of out, and lanes for lse, have stored
      attention::contain_out<Config>(forward, place.batch, place.head, place.tile * Config::kTileQ,
                                     {first_query, first_query + kWarpRows}, 1);
    }
  }
}

// Threads: a whole warpgroup.
template <class Config>
__device__ __forceinline__ void consume(const Sm90ForwardParams& params,
                                        const ForwardStages<Config>& stages, int consumer) {
  using Shapes = ForwardShapes<Config>;
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

  typename Shapes::QueryPosition query;
  typename Shapes::KeyPosition key;
  typename Shapes::ValuePosition value;
  int staged = -1;  // the query stage whose copy of out may still be read
  const auto release_staged = [&] {
    if (staged >= 0 && ptx::elect_lane()) {
      ptx::bulk_wait_read();
      stages.query.release(staged);
    }
    staged = -1;
  };

  // The first consumer starts first.
  if (Shapes::kConsumers > 1 && consumer == Shapes::kConsumers - 1)
    ptx::barrier_arrive(kTurnBarrier, 256);

#pragma unroll 1
  for (attention::TileOrder<Config> order(params); order.valid(); order.advance()) {
    const auto place = order.place();
    const int first_query = place.tile * Config::kTileQ;
    const attention::Range key_tiles = range.key_tiles(first_query);
    const attention::ScoreTransform<Config> transform(attention, place.batch, place.head);

    typename Shapes::Scores scores;
    typename Shapes::Out out;
    out.clear();
    attention::OnlineSoftmax<1> softmax;

    const auto start_scores = [&] {
      tile::start_row_product<Element, Shapes::kHeadDimSteps>(
          scores, q_rows, query.stage * QueryTile::kBytes, k_rows, key.stage * KeyTile::kBytes);
    };
    using Probs = typename Shapes::Probs;
    const auto attend = [&](int key_tile, Probs& probs, auto await_out) {
      const int first_key = key_tile * Config::kTileK;
      const typename Shapes::Layout layout(first_query + warp_row, first_key);
      transform.apply(scores, layout);
      if (__builtin_expect(
              range.template cuts<kConsumerRows>(first_query + consumer_row, first_key), false))
        attention::mask_scores(scores, layout, attention::VisibleRange<Config>(attention));
      softmax.template attend<!Config::kDropout>(
          scores, out, transform.exponent_scale,
          [&](int pair, float (&left)[4], float (&right)[4]) {
            if constexpr (Config::kDropout)
              attention::Dropout(attention, place.batch, place.head)
                  .for_pair(layout, 0, pair, [&](int side, int i, bool kept) {
                    if (!kept) (side == 0 ? left : right)[i] = 0.0f;
                  });
            probs.template pack_step<Element>(0, pair, left, right);
          },
          await_out);
    };
    const auto start_out = [&](const Probs& probs) {
      stages.value.wait_full(value);
      tile::start_register_product<Element>(out, probs, v_columns, value.stage * KeyTile::kBytes);
    };
    const auto release_value = [&] {
      if (leads) stages.value.release(value.stage);
      value.advance();
    };
    // The probabilities of a key tile, while those of the one before meet their values.
    const auto step = [&](int key_tile, const Probs& before, Probs& probs) {
      constexpr bool kOverlap = Config::kProbBuffers == 2;
      stages.key.wait_full(key);
      if (Shapes::kConsumers > 1) ptx::barrier_sync(kTurnBarrier + consumer, 256);
      start_scores();
      start_out(before);
      if (Shapes::kConsumers > 1)
        ptx::barrier_arrive(kTurnBarrier + (consumer + 1) % Shapes::kConsumers, 256);
      ptx::wgmma_wait<kOverlap ? 1 : 0>();  // scores are there; with kOverlap, p v runs on
      if (leads) stages.key.release(key.stage);
      key.advance();
      if constexpr (!kOverlap) release_value();
      attend(key_tile, probs, [] {
        if constexpr (kOverlap) ptx::wgmma_wait<0>();
      });
      if constexpr (kOverlap) {
        ptx::wgmma_wait<0>();
        release_value();
      }
    };
    const auto finish = [&](const Probs& probs) {
      start_out(probs);
      ptx::wgmma_wait<0>();
      release_value();
    };

    stages.query.wait_full(query);
    if (!key_tiles.empty()) {
      stages.key.wait_full(key);
      start_scores();
      release_staged();
      ptx::wgmma_wait<0>();
      if (leads) stages.key.release(key.stage);
      key.advance();
      Probs even;
      attend(key_tiles.end - 1, even, [] {});
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
      release_staged();
    }
    // Where the tile lies is worked out again: kept, it would take registers from the loop above.
    write_rows<Config>(params, order.place(),
                       stages.shared + Shapes::kQueryOffset + query.stage * QueryTile::kBytes, out,
                       softmax, transform.exponent_scale, warp_row);
    staged = query.stage;
    query.advance();
    if (Config::kQueryStages == 1) release_staged();
  }
  if (ptx::elect_lane()) ptx::bulk_wait();
}

template <class Config>
__device__ __forceinline__ void forward(const Sm90ForwardParams& params, unsigned char* shared) {
  using Shapes = ForwardShapes<Config>;
  const ForwardStages<Config> stages(tile::shared_address(shared));
  if (threadIdx.x == 0) {
    stages.query.init(Shapes::kConsumers * 4);
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
