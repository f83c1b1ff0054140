// dq on Hopper, by itself. With scores = scale q k^T, probs = exp(scores - lse) and
// dprobs = dout v^T, for every key tile that a query tile sees:
//
//   dscores = probs (dprobs - delta)      dq += scale dscores k
//
// The roles are those of sm90/key_walk.cuh; q and dout of a query tile lie in one stage. dscores
// feeds dq from registers, so that nothing is exchanged between warps, dq is summed in one order
// and leaves the CTA once, in 16 bits. A consumer starts scores of a key tile, dq of the one before
// and dprobs of this one in its turn, and passes the turn on; its exponentials run beside its own
// dq and dprobs, and beside the products of the other.
//
// Under a mask the last key tiles of a query tile, which come first, may be hidden from the first
// consumer's rows. Where they are narrow, it takes turns in which it starts nothing.
//
// The three warps beside the producer work out lse and delta of every query row, a tile ahead of
// the consumers, and leave them to sm90/key_gradient.cuh, which comes behind.
//
//   ring                stages                   filled with and released
//   statistics          kStatisticsStages        lse and delta of a query tile, by all threads of
//                                                the three warps; by all of the consumers
//
//   barrier             threads                  what it orders
//   1 + consumer        two consumers (256)      whose turn it is to start products
#pragma once

#include <attention/containment.cuh>
#include <attention/dropout.cuh>
#include <attention/head_address.cuh>
#include <attention/query_group.cuh>
#include <attention/score_layout.cuh>
#include <attention/score_transform.cuh>
#include <attention/visible_range.cuh>
#include <params/backward_params.h>
#include <ptx/grid_dependency.cuh>
#include <ptx/warpgroup.cuh>
#include <sm90/gradient_rows.cuh>
#include <sm90/key_walk.cuh>
#include <sm90/query_statistics.cuh>
#include <tile/descriptor.cuh>

namespace jfa::sm90 {

template <class Config>
struct QueryGradientShapes : KeyWalkShapes<Config, 2, true> {
  using KeyWalk = KeyWalkShapes<Config, 2, true>;
  static_assert(kWorkspaceRowMultiple % Config::kTileQ == 0, "statistics are padded to that");
  static_assert(Config::kKeyStages > 1, "k of a tile is kept beside the next one's");
  // The warps that read rows keep many loads on their way, as many as short sequences need; wide
  // consumers leave them fewer.
  static_assert(KeyWalk::kConsumers == 2, "registers are dealt out for two consumers");
  static constexpr bool kWide = Config::kHeadDim > 128;
  static constexpr int kProducerRegisters = kWide ? 56 : 104;
  static constexpr int kConsumerRegisters = kWide ? 224 : 200;
  static constexpr int kChunksAhead = kWide ? 4 : 8;
  // Steps of q that a consumer holds in registers. A step of 64 rows by 32 keys reads 2 KB of rows
  // and 1 KB of keys from shared memory, which takes 24 cycles, and computes for 16. Dropout has no
  // registers for that.
  static constexpr int kHeldSteps = kWide && Config::kTileK == 32 && !Config::kDropout ? 6 : 0;
  // Up to head dim 64 whole heads may compute the same gradients.
  using Order = KeyOrder<Config, Config::kHeadDim <= 64 && Config::kTileK == 64>;
  // Where tiles are half as wide as a consumer's rows are many, two are hidden, which saves 3% at
  // head dim 256; with one that is as wide it costs 4% at head dim 128 (docs/tuning.md). Keys then
  // come from the last to the first: the order of whole heads is for tiles of 64.
  static constexpr bool kSkipsHidden = Config::kWindowed && 2 * Config::kTileK <= kConsumerRows;
  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kKeySteps = Config::kTileK / 16;
  using Scores = tile::Accumulator<1, kKeySteps>;
  using Gradient = tile::Accumulator<1, kHeadDimSteps>;
  using Dscores = tile::RegisterOperand<1, kKeySteps>;
  using HeldQueries = tile::RegisterOperand<1, kHeldSteps == 0 ? 1 : kHeldSteps>;
  using Layout = attention::ScoreLayout<16, 16>;

  static constexpr int kStatisticsStages = 2;
  using StatisticsRing = tile::Ring<kStatisticsStages>;
  using StatisticsPosition = tile::RingPosition<kStatisticsStages>;
  static constexpr int kStatisticsOffset = KeyWalk::kSharedBytes;
  static constexpr int kStatisticsRingOffset =
      kStatisticsOffset + kStatisticsStages * Config::kTileQ * 8;
  static constexpr int kSharedBytes = kStatisticsRingOffset + StatisticsRing::kBytes;
};

// What consumers know of a query row.
struct QueryStatistics {
  float lse_log2;
  float delta;
};

// The rings of the key walk, and one of statistics.
template <class Config>
struct QueryGradientStages : KeyWalkStages<Config, QueryGradientShapes<Config>> {
  using Shapes = QueryGradientShapes<Config>;
  QueryStatistics* rows;
  typename Shapes::StatisticsRing statistics;

  __device__ __forceinline__ explicit QueryGradientStages(unsigned char* shared_memory)
      : KeyWalkStages<Config, Shapes>(shared_memory),
        rows(reinterpret_cast<QueryStatistics*>(shared_memory + Shapes::kStatisticsOffset)),
        statistics{this->shared + Shapes::kStatisticsRingOffset} {}

  // Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init() const {
    statistics.init(Shapes::kConsumers * 128, kStatisticsWarps * 32);
    KeyWalkStages<Config, Shapes>::init();
  }

  // Of a row of a query tile.
  __device__ __forceinline__ QueryStatistics& row(const typename Shapes::StatisticsPosition& at,
                                                  int tile_row) const {
    return rows[at.stage() * Config::kTileQ + tile_row];
  }
};

// The statistics of all query tiles of this CTA, for its consumers and for the kernel behind.
// Threads: a whole warp, of kStatisticsWarps.
template <class Config>
__device__ __forceinline__ void make_statistics(const Sm90DealtBackwardParams& params,
                                                const QueryGradientStages<Config>& stages,
                                                int warp) {
  using Shapes = QueryGradientShapes<Config>;
  typename Shapes::StatisticsPosition at;
  attention::TileOrder<Config> order(params.backward.attention, params.tiles);
#pragma unroll 1
  for (; order.valid(); order.advance()) {
    const attention::TilePlace place = order.place();
    stages.statistics.await_empty(at);
    make_statistics<Config, Config::kTileQ, Shapes::kChunksAhead>(
        params.backward, place.batch, place.head, place.tile * Config::kTileQ, warp,
        [&](int tile_row, float lse_log2, float delta) {
          stages.row(at, tile_row) = {lse_log2, delta};
        });
    stages.statistics.finish_fill(at);
    at.advance();
  }
  tell_statistics(params);
}

// The 16 rows of dq that a warp has. Threads: a whole warp.
template <class Config, class Gradient>
__device__ __forceinline__ void write_query_gradient(const BackwardParams& params, int batch,
                                                     int head, int first_tile_query,
                                                     int first_query, Gradient& dq) {
  store_query_gradient<Config>(params, batch, head, first_query, dq);
  if constexpr (Config::kWindowed) {
    if (__builtin_expect(__any_sync(0xffffffffu, !dq.is_finite()), false)) {
      __syncwarp();  // contain_dq reads what other lanes have written
      attention::contain_dq<Config>(params, batch, head, first_tile_query,
                                    {first_query, first_query + kWarpRows}, 1);
    }
  }
}

// Threads: a whole warpgroup.
template <class Config>
__device__ __forceinline__ void consume_query_gradient(const Sm90DealtBackwardParams& params,
                                                       const QueryGradientStages<Config>& stages,
                                                       int consumer) {
  using Shapes = QueryGradientShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  const AttentionParams& attention = params.backward.attention;
  const attention::VisibleRange<Config> range(attention);

  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32);
  const int consumer_row = consumer * kConsumerRows;
  const int warp_row = consumer_row + warp * kWarpRows;
  const bool leads = threadIdx.x % 128 == 0;

  // Worked out anew at every use, or else the compiler keeps what follows from them in registers.
  const auto shared = [&] { return ptx::opaque(stages.shared); };

  typename Shapes::Scores scores;
  typename Shapes::Scores dprobs;
  typename Shapes::Gradient dq;
  typename Shapes::Dscores dscores;
  typename Shapes::HeldQueries held_queries;
  typename Shapes::QueryPosition query;
  typename Shapes::StatisticsPosition statistics_at;
  unsigned steps = 0;  // so far; k and v of a key tile come in step, so one counter serves both
  const auto key = [&] { return typename Shapes::KeyPosition{steps}; };
  const auto key_before = [&] { return typename Shapes::KeyPosition{steps - 1}; };
  const auto value = [&] { return typename Shapes::ValuePosition{steps}; };
  const ConsumerTurns<Shapes::kConsumers> turns{consumer};
  const auto start_scores = [&] {
    const unsigned base = shared();
    const tile::RowDescriptor<QueryTile> rows(base + Shapes::kQueryOffset, consumer_row);
    const tile::RowDescriptor<KeyTile> columns(base + Shapes::kKeyOffset, 0);
    if constexpr (Shapes::kHeldSteps > 0) {
      tile::start_held_product<Element, Shapes::kHeadDimSteps>(
          scores, held_queries, rows, query.stage() * Shapes::kQueryBytes, columns,
          key().stage() * KeyTile::kBytes);
    } else {
      tile::start_shared_product<Element, Shapes::kHeadDimSteps, /*kFresh=*/false,
                                 /*kUniform=*/true>(scores, rows,
                                                    query.stage() * Shapes::kQueryBytes, columns,
                                                    key().stage() * KeyTile::kBytes);
    }
  };
  const auto start_dprobs = [&] {
    stages.value.wait_full(value());
    const unsigned base = shared();
    tile::start_shared_product<Element, Shapes::kHeadDimSteps, /*kFresh=*/false,
                               /*kUniform=*/true>(
        dprobs,
        tile::RowDescriptor<QueryTile>(base + Shapes::kQueryOffset + QueryTile::kBytes,
                                       consumer_row),
        query.stage() * Shapes::kQueryBytes,
        tile::RowDescriptor<KeyTile>(base + Shapes::kValueOffset, 0),
        value().stage() * KeyTile::kBytes);
  };
  const auto start_gradient = [&] {
    tile::start_register_product<Element, /*kUniform=*/true>(
        dq, dscores, tile::ColumnDescriptor<KeyTile>(shared() + Shapes::kKeyOffset),
        key_before().stage() * KeyTile::kBytes);
  };
  const auto release_key = [&] {
    if (leads) stages.key.release(key_before().stage());
  };
  const auto release_value = [&] {
    if (leads) stages.value.release(value().stage());
  };

  turns.start();

#pragma unroll 1
  while (true) {
    stages.query.wait_full(query);
    const auto place = stages.place(query);
    if (place.tile == kNoTile) break;
    const int first_query = place.tile * Config::kTileQ;
    const attention::Range key_tiles = range.key_tiles(first_query);
    const attention::ScoreTransform<Config> transform(attention, place.batch, place.head);
    dq.clear();

    if (key_tiles.empty()) {
      stages.query.release(query.stage());
      stages.statistics.wait_full(statistics_at);
      stages.statistics.release(statistics_at.stage());
    } else {
      if constexpr (Shapes::kHeldSteps > 0)
        held_queries.template read_rows<QueryTile>(
            shared() + Shapes::kQueryOffset + query.stage() * Shapes::kQueryBytes, warp_row);
      typename Shapes::Order order(key_tiles);
      if constexpr (Shapes::kSkipsHidden) {
        const int last_key = range.last_visible(first_query + kConsumerRows - 1);
#pragma unroll 1
        while (consumer == 0 && order.has_next() && order.first_key() > last_key) {
          turns.await();
          turns.pass();
          // Who lets go of k and v is the only one to wait for them: a warp that comes later may
          // find the stages filled anew, and would wait forever.
          if (leads) {
            stages.key.wait_full(key());
            stages.key.release(key().stage());
            stages.value.wait_full(value());
            stages.value.release(value().stage());
          }
          __syncwarp();  // barriers and products want whole warps
          order.advance();
          ++steps;
        }
      }
      stages.key.wait_full(key());
      turns.await();
      start_scores();
      start_dprobs();
      turns.pass();
      stages.statistics.wait_full(statistics_at);
      QueryStatistics rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        rows[half] = stages.row(statistics_at, warp_row + ptx::reread_lane() / 4 + 8 * half);
      stages.statistics.release(statistics_at.stage());

      const auto make_probs = [&](const typename Shapes::Layout& layout, int first_key) {
        transform.apply(scores, layout);
        if (__builtin_expect(
                range.template cuts<kConsumerRows>(first_query + consumer_row, first_key), false))
          attention::mask_scores(scores, layout, attention::VisibleRange<Config>(attention));
#pragma unroll
        for (int n = 0; n < Shapes::Scores::kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            scores.values[0][n][i] = transform.prob(scores.values[0][n][i], rows[i / 2].lse_log2);
      };
      const auto make_dscores = [&](const typename Shapes::Layout& layout) {
#pragma unroll
        for (int pair = 0; pair < Shapes::kKeySteps; ++pair) {
          if constexpr (Config::kDropout)
            attention::Dropout(attention, place.batch, place.head)
                .for_pair(layout, 0, pair, [&](int side, int i, bool kept) {
                  float& dprob = dprobs.values[0][2 * pair + side][i];
                  dprob = kept ? dprob * attention.dropout_scale : 0.0f;
                });
#pragma unroll
          for (int n = 2 * pair; n < 2 * pair + 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              dprobs.values[0][n][i] = transform.dscore(
                  scores.values[0][n][i], dprobs.values[0][n][i], rows[i / 2].delta,
                  rows[i / 2].lse_log2, layout.query(0, n, i), layout.key(0, n, i));
          dscores.template pack_step<Element>(0, pair, dprobs.values[0][2 * pair],
                                              dprobs.values[0][2 * pair + 1]);
        }
      };

      int first_key = order.first_key();
      ptx::wgmma_wait<1>();  // scores
      make_probs({first_query + warp_row, first_key}, first_key);
      ptx::wgmma_wait<0>();  // dprobs
      release_value();
      make_dscores({first_query + warp_row, first_key});
#pragma unroll 1
      while (order.has_next()) {
        order.advance();
        first_key = order.first_key();
        ++steps;
        stages.key.wait_full(key());
        turns.await();
        start_scores();
        start_gradient();
        start_dprobs();
        turns.pass();
        ptx::wgmma_wait<2>();  // scores
        make_probs({first_query + warp_row, first_key}, first_key);
        ptx::wgmma_wait<0>();  // dq and dprobs
        release_key();
        release_value();
        make_dscores({first_query + warp_row, first_key});
      }
      stages.query.release(query.stage());
      ++steps;
      turns.await();
      start_gradient();
      turns.pass();
      ptx::wgmma_wait<0>();
      release_key();
    }
    write_query_gradient<Config>(params.backward, place.batch, place.head, first_query,
                                 first_query + warp_row, dq);
    query.advance();
    statistics_at.advance();
  }
}

template <class Config>
__device__ __forceinline__ void query_gradient(const Sm90DealtBackwardParams& params,
                                               unsigned char* shared) {
  using Shapes = QueryGradientShapes<Config>;
  using QueryTile = typename Shapes::QueryTile;
  using Place = attention::TilePlace;
  const AttentionParams& attention = params.backward.attention;
  start_key_gradient(params);
  const QueryGradientStages<Config> stages(shared);
  const auto load_q_and_dout = [&](unsigned target, unsigned barrier, const Place& place) {
    const int row = place.tile * Config::kTileQ;
    load_tile<QueryTile>(target, params.q, barrier, ptx::kEvictLast, row, place.head,
                         attention::own_batch(place.batch, attention.q.batches));
    load_tile<QueryTile>(target + QueryTile::kBytes, params.dout, barrier, ptx::kEvictLast, row,
                         place.head,
                         attention::own_batch(place.batch, params.backward.dout.batches));
  };
  run_key_walk<Shapes>(
      stages,
      [&] {
        produce<Config, Shapes>(stages, attention, attention::key_head_group(params.backward),
                                params.tiles, params.k, params.v, load_q_and_dout);
      },
      [&](int warp) { make_statistics<Config>(params, stages, warp); },
      [&](int consumer) { consume_query_gradient<Config>(params, stages, consumer); });
}

}  // namespace jfa::sm90
