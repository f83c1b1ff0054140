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
#include <attention/visible_range.cuh>
#include <params/forward_params.h>
#include <ptx/warpgroup.cuh>
#include <sm90/key_walk.cuh>
#include <tile/descriptor.cuh>
#include <tile/write_rows.cuh>

namespace jfa::sm90 {

template <class Config>
struct ForwardShapes : KeyWalkShapes<Config, 1, false> {
  // Whether the first product of a query tile starts before the last out is written.
  static constexpr bool kAcrossTiles = Config::kQueryStages > 1;

  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kKeySteps = Config::kTileK / 16;
  using Scores = tile::Accumulator<1, kKeySteps>;
  using Out = tile::Accumulator<1, kHeadDimSteps>;
  using Probs = tile::RegisterOperand<1, kKeySteps>;
  using Layout = attention::ScoreLayout<16, 16>;
};

template <class Config>
using ForwardStages = KeyWalkStages<Config, ForwardShapes<Config>>;

// out and lse of the 16 rows of a warp.
// Threads: a whole warp.
template <class Config, class Out>
__device__ __forceinline__ void write_out(const ForwardParams& params,
                                          const attention::TilePlace& place, Out& out,
                                          attention::OnlineSoftmax<1>& softmax,
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
  using Place = attention::TilePlace;
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
  const ConsumerTurns<Shapes::kConsumers> turns{consumer};
  // Waits for what the first product of a query tile reads, and returns where the tile lies.
  const auto await_tile = [&]() -> Place {
    stages.query.wait_full(query);
    const Place place = stages.place(query);
    if (place.tile != kNoTile && !range.key_tiles(place.tile * Config::kTileQ).empty())
      stages.key.wait_full(key);
    return place;
  };

  turns.start();

  Place next;
  if (Shapes::kAcrossTiles) {
    next = await_tile();
    start_scores();
  }
#pragma unroll 1
  while (true) {
    if constexpr (!Shapes::kAcrossTiles) next = await_tile();
    const Place place = next;
    if (place.tile == kNoTile) break;
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
      turns.await();
      start_scores();
      start_out(before);
      turns.pass();
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
        turns.await();
        start_last_out();
        next = await_tile();
        start_scores();
        turns.pass();
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
  using Place = attention::TilePlace;
  const AttentionParams& attention = params.forward.attention;
  const ForwardStages<Config> stages(shared);
  const auto load_q = [&](unsigned target, unsigned barrier, const Place& place) {
    load_tile<typename Shapes::QueryTile>(target, params.q, barrier, ptx::kEvictFirst,
                                          place.tile * Config::kTileQ, place.head,
                                          attention::own_batch(place.batch, attention.q.batches));
  };
  run_key_walk<Shapes>(
      stages,
      [&] {
        ptx::prefetch_tensor_map(params.q);
        ptx::prefetch_tensor_map(params.k);
        ptx::prefetch_tensor_map(params.v);
        produce<Config, Shapes>(stages, attention, attention.heads / attention.heads_k,
                                params.tiles, params.k, params.v, load_q);
      },
      [](int) {}, [&](int consumer) { consume<Config>(params, stages, consumer); });
}

}  // namespace jfa::sm90
