// What the backward kernels on Hopper share: the walk of a CTA, its copies, and the steps from
// products to probabilities and to dscores.
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
#include <ptx/shared_load.cuh>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <sm90/load_tile.cuh>
#include <tile/bulk_accumulator.cuh>
#include <tile/copy.cuh>
#include <tile/descriptor.cuh>
#include <tile/ring.cuh>
#include <tile/write_rows.cuh>

namespace jfa::sm90 {

constexpr int kBackwardConsumers = 2;
constexpr int kBackwardThreads = (kBackwardConsumers + 1) * 128;
constexpr int kBackwardConsumerRegisters = 240;
constexpr int kBackwardProducerRegisters = 24;

// A CTA's walk: all query tiles that see its keys, for each query head of its group, or a part of
// one's (attention/query_group.cuh). kStaggered:
// CTAs side by side start apart, as a causal mask would have it: additions to one dq tile at one
// time wait for each other (3 to 6% without a mask on an H100). Where nothing is added they start
// together, and read a tile from L2 at the same time.
template <class Config, bool kStaggered = true>
struct BackwardWalk {
  static constexpr bool kHasParts = Config::kHeadDim <= kPartHeadDim;
  attention::TilePlace place;  // head is the key head
  int group;
  int first_head;  // unused, and in no register, where there are no parts
  int first_key;
  attention::Range query_tiles;

  BackwardWalk() = default;
  __device__ __forceinline__ BackwardWalk(const AttentionParams& attention,
                                          const attention::TilePlace& tile_place)
      : place(tile_place),
        group(attention::group_heads<Config>(attention)),
        first_head(attention::first_query_head(attention, place.head)),
        first_key(place.tile * Config::kTileK),
        query_tiles(attention::own_query_tiles<Config>(
            attention, place.head,
            attention::VisibleRange<Config>(attention).query_tiles(first_key))) {}

  __device__ __forceinline__ int steps() const {
    return query_tiles.empty() ? 0 : group * (query_tiles.end - query_tiles.begin);
  }

  // One step of the walk.
  struct Step {
    int head;
    int query_tile;
  };
  __device__ __forceinline__ Step first() const {
    return {kHasParts ? first_head : place.head * group, first_tile()};
  }
  __device__ __forceinline__ void advance(Step& step) const {
    if (++step.query_tile == query_tiles.end) step.query_tile = query_tiles.begin;
    if (step.query_tile == first_tile()) ++step.head;
  }
  __device__ __forceinline__ int first_tile() const {
    if constexpr (Config::kWindowed || !kStaggered) return query_tiles.begin;
    // Fractions of the golden ratio: far apart for neighbours, and no division in the loop.
    return query_tiles.begin +
           __umulhi(place.tile * 0x9e3779b9u, query_tiles.end - query_tiles.begin);
  }
};

// What all roles see of the shared memory.
template <class ShapesOfKernel>
struct BackwardStages {
  using Shapes = ShapesOfKernel;
  unsigned shared;
  typename Shapes::QueryRing query;
  typename Shapes::DoutRing dout;
  typename Shapes::KeyRing keys;

  __device__ __forceinline__ explicit BackwardStages(unsigned shared_address)
      : shared(shared_address),
        query{shared_address + Shapes::kQueryRingOffset},
        dout{shared_address + Shapes::kDoutRingOffset},
        keys{shared_address + Shapes::kKeyRingOffset} {}
};

// Fetches a query tile of q or dout, and its lse or delta; before_statistics() comes between.
// map_batch: the batch entry of q or dout. Threads: one.
template <class Config, class Shapes, class Ring, class Position, class Step, class Between>
__device__ __forceinline__ void load_query_tile(unsigned tiles, unsigned rows, const Ring& ring,
                                                Position& at, const TensorMap& map, int map_batch,
                                                const BackwardParams& backward,
                                                const float* statistics, int batch,
                                                const Step& step, Between before_statistics) {
  using QueryTile = typename Shapes::QueryTile;
  const int first_query = step.query_tile * Config::kTileQ;
  const unsigned barrier = ring.full(at.stage());
  ring.begin_fill(at, QueryTile::kBytes + Shapes::kStatisticsBytes);
  load_tile<QueryTile>(tiles + at.stage() * QueryTile::kBytes, map, barrier, ptx::kEvictLast,
                       first_query, step.head, map_batch);
  before_statistics();
  ptx::bulk_load(rows + at.stage() * Shapes::kStatisticsBytes,
                 statistics + attention::workspace_row(backward, batch, step.head, first_query),
                 Shapes::kStatisticsBytes, barrier);
  at.advance();
}

// q and lse. Threads: one.
template <class Config, class Shapes, class Step, class Between>
__device__ __forceinline__ void load_query(const BackwardStages<Shapes>& stages,
                                           typename Shapes::QueryPosition& at, const TensorMap& q,
                                           int q_batch, const BackwardParams& backward, int batch,
                                           const Step& step, Between before_statistics) {
  load_query_tile<Config, Shapes>(stages.shared + Shapes::kQueryOffset,
                                  stages.shared + Shapes::kLseOffset, stages.query, at, q, q_batch,
                                  backward, backward.lse_log2, batch, step, before_statistics);
}

// dout and delta. Threads: one.
template <class Config, class Shapes, class Step>
__device__ __forceinline__ void load_dout(const BackwardStages<Shapes>& stages,
                                          typename Shapes::DoutPosition& at, const TensorMap& dout,
                                          int dout_batch, const BackwardParams& backward, int batch,
                                          const Step& step) {
  load_query_tile<Config, Shapes>(stages.shared + Shapes::kDoutOffset,
                                  stages.shared + Shapes::kDeltaOffset, stages.dout, at, dout,
                                  dout_batch, backward, backward.delta, batch, step, [] {});
}

// Fetches the query tiles of a walk: q before dout, since consumers start scores before dprobs.
// load_keys() follows the first q; it may wait for the statistics, too. before_query(n) comes
// before query tile n of the walk is fetched. Threads: one.
template <class Config, class Shapes, class Walk, class LoadKeys, class BeforeQuery>
__device__ __forceinline__ void load_queries(const TensorMap& q, const TensorMap& dout,
                                             const BackwardParams& backward,
                                             const BackwardStages<Shapes>& stages, const Walk& walk,
                                             typename Shapes::QueryPosition& query_at,
                                             typename Shapes::DoutPosition& dout_at,
                                             LoadKeys load_keys, BeforeQuery before_query) {
  const int batch = walk.place.batch;
  const int q_batch = attention::own_batch(batch, backward.attention.q.batches);
  const int dout_batch = attention::own_batch(batch, backward.dout.batches);
  int remaining = walk.steps();
  if (remaining == 0) return;
  typename Walk::Step step = walk.first();
  before_query(0);
  load_query<Config>(stages, query_at, q, q_batch, backward, batch, step, load_keys);
#pragma unroll 1
  while (true) {
    load_dout<Config>(stages, dout_at, dout, dout_batch, backward, batch, step);
    if (--remaining == 0) break;
    walk.advance(step);
    before_query(walk.steps() - remaining);
    load_query<Config>(stages, query_at, q, q_batch, backward, batch, step, [] {});
  }
}

// Which elements of a thread's share of scores^T dropout keeps.
template <class Config, class Scores>
struct KeptBits {
  static constexpr int kTilesPerWord = 8;  // of four elements
  unsigned words[(Scores::kColumnTiles + kTilesPerWord - 1) / kTilesPerWord];

  template <class Layout>
  __device__ __forceinline__ void draw(const AttentionParams& params, int batch, int head,
                                       const Layout& layout) {
    if constexpr (Config::kDropout) {
#pragma unroll
      for (unsigned& word : words) word = ~0u;
      const attention::Dropout dropout(params, batch, head);
#pragma unroll
      for (int pair = 0; pair < Scores::kColumnPairs; ++pair)
        dropout.for_pair(layout, 0, pair, [&](int side, int i, bool kept) {
          const int n = 2 * pair + side;
          if (!kept) words[n / kTilesPerWord] &= ~(1u << (4 * (n % kTilesPerWord) + i));
        });
    }
  }

  __device__ __forceinline__ bool kept(int n, int i) const {
    return !Config::kDropout ||
           (words[n / kTilesPerWord] >> (4 * (n % kTilesPerWord) + i)) % 2 == 1;
  }
};

// The value for each column of an accumulator, from a vector in shared memory.
__device__ __forceinline__ float2 column_pair(const float* vector, int n) {
  return *reinterpret_cast<const float2*>(vector + n * 8 + ptx::reread_lane() % 4 * 2);
}

// lse or delta of a tile's queries, for the columns of an accumulator that a thread holds. Reads
// are kept ahead of their use, by half a tile or so, the first before a wait for products. Left to
// itself ptxas has three on their way, and each takes as long as shared memory is busy with the
// other consumer's products (docs/tuning.md).
template <class Scores, int kAhead = Scores::kColumnTiles / 2>
struct ColumnStatistics {
  unsigned address;
  float2 ahead[kAhead];

  __device__ __forceinline__ float2 read(int n) const {
    return ptx::load_shared_pair(address + n * 8 * static_cast<int>(sizeof(float)));
  }
  __device__ __forceinline__ void load(const float* vector) {
    address = tile::shared_address(vector + ptx::reread_lane() % 4 * 2);
#pragma unroll
    for (int n = 0; n < kAhead; ++n) ahead[n] = read(n);
  }
  // Of column tile n. Each once, in order.
  __device__ __forceinline__ float2 take(int n) {
    const float2 pair = ahead[n % kAhead];
    if (n + kAhead < Scores::kColumnTiles) ahead[n % kAhead] = read(n + kAhead);
    return pair;
  }
};

// A tile of scores^T, or of its gradient: where it lies.
struct ScoreTile {
  int batch;
  int head;
  int first_query;
  int first_key;  // of the tile
  int warp_key;   // of the warp's 16 rows

  __device__ __forceinline__ attention::TransposedScoreLayout layout() const {
    return {first_query, warp_key};
  }
};

// From products to probabilities. lse: of the tile's queries.
template <class Config, class Scores, int kAhead>
__device__ __forceinline__ void make_probs(Scores& scores, const AttentionParams& attention,
                                           const ScoreTile& tile,
                                           ColumnStatistics<Scores, kAhead>& lse) {
  const attention::ScoreTransform<Config> transform(attention, tile.batch, tile.head);
  const attention::TransposedScoreLayout layout = tile.layout();
  transform.apply(scores, layout);
  const attention::VisibleRange<Config> range(attention);
  if (__builtin_expect(range.cuts(tile.first_query, tile.first_key), false))
    attention::mask_scores(scores, layout, range);
#pragma unroll
  for (int n = 0; n < Scores::kColumnTiles; ++n) {
    const float2 column_lse = lse.take(n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& value = scores.values[0][n][i];
      value = transform.exponent(value, i % 2 == 0 ? column_lse.x : column_lse.y);
    }
  }
  // All exponents come first: reads of lse do not wait behind exponentials.
#pragma unroll
  for (int n = 0; n < Scores::kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores.values[0][n][i] = ptx::exp2_approx(scores.values[0][n][i]);
}

// The probabilities that dropout keeps, as an operand.
template <class Config, class Scores, class Probs>
__device__ __forceinline__ void round_probs(const Scores& probs,
                                            const KeptBits<Config, Scores>& dropout,
                                            Probs& rounded) {
#pragma unroll
  for (int part = 0; part < Scores::kColumnPairs; ++part) {
    float kept[2][4];
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        kept[side][i] =
            dropout.kept(2 * part + side, i) ? probs.values[0][2 * part + side][i] : 0.0f;
    rounded.template pack_step<typename Config::Element>(0, part, kept[0], kept[1]);
  }
}

// Column tile n of dprobs becomes one of dscores. lse: of the tile's queries.
template <class Config, class Scores>
__device__ __forceinline__ void make_dscores(Scores& dprobs, int n, const float (&probs)[4],
                                             const KeptBits<Config, Scores>& dropout,
                                             const attention::ScoreTransform<Config>& transform,
                                             const attention::TransposedScoreLayout& layout,
                                             float dropout_scale, float2 column_delta,
                                             const float* lse) {
  float2 column_lse{};
  if constexpr (Config::kSoftcap) column_lse = column_pair(lse, n);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float& value = dprobs.values[0][n][i];
    if constexpr (Config::kDropout) value = dropout.kept(n, i) ? value * dropout_scale : 0.0f;
    value = transform.dscore(probs[i], value, i % 2 == 0 ? column_delta.x : column_delta.y,
                             i % 2 == 0 ? column_lse.x : column_lse.y, layout.query(0, n, i),
                             layout.key(0, n, i));
  }
}

// The 16 rows of dk or dv that a warp has. Threads: a whole warp.
template <class Config, class Gradient>
__device__ __forceinline__ void store_key_gradient(const TensorView& view, const Gradient& gradient,
                                                   const attention::TilePlace& place, int seqlen_k,
                                                   int warp_row) {
  const int first_row = place.tile * Config::kTileK + warp_row;
  tile::write_rows<typename Config::Element, Config::kHeadDim>(
      attention::head_address(view, place.batch, place.head) +
          static_cast<long long>(first_row) * view.row_stride,
      view.row_stride, seqlen_k - first_row, gradient);
}

// A query tile's dq on its way from fp32 sums to 16 bits. Threads: two warpgroups.
template <class Config, class QueryTile>
struct QueryGradientTile {
  static constexpr int kThreads = kBackwardConsumers * 128;
  const BackwardParams& params;
  attention::TilePlace place;
  int first_query;

  __device__ __forceinline__ QueryGradientTile(const BackwardParams& backward,
                                               const attention::TilePlace& tile_place)
      : params(backward), place(tile_place), first_query(place.tile * Config::kTileQ) {}

  // Scales and rounds the part that starts `offset` floats into the sums, and at row first_row and
  // 16-block first_column16 of the tile. Returns whether it is finite. Threads: a whole warpgroup.
  template <class Part>
  __device__ __forceinline__ bool stage(Part part, int offset, int first_row, int first_column16,
                                        unsigned char* shared) const {
    const long long row = attention::workspace_row(params, place.batch, place.head, first_query);
    const tile::BulkAccumulator<Part> accumulator{params.dq_accum + row * params.padded_columns +
                                                  offset};
    accumulator.load(part);
    part.scale(params.attention.softmax_scale);
    tile::store_accumulator<typename Config::Element, QueryTile, 16, 1>(
        tile::shared_address(shared), first_column16 / 4 * QueryTile::kPanelBytes, part,
        first_row + static_cast<int>(threadIdx.x) % 128 / 32 * 16, first_column16 % 4);
    return part.is_finite();
  }

  __device__ __forceinline__ void store(bool finite, unsigned char* shared) const {
    // store_rows reads what other warps staged
    const bool spoilt = attention::barrier_any_spoilt<Config>(!finite);
    tile::store_rows<QueryTile, Config::kHeadDim, kThreads>(
        shared, attention::head_address(params.dq, place.batch, place.head), params.dq.row_stride,
        first_query, params.attention.seqlen_q);
    attention::contain_gradients<Config>(params, place, spoilt, kThreads / 32);
  }
};

}  // namespace jfa::sm90
