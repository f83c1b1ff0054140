// Forward attention with mma.sync: out = softmax(scale q k^T) v, tile by tile, and lse.
//
// One CTA computes one query tile of one head: each warp owns kTileQ / kWarps rows and all keys, so
// softmax needs no exchange between warps. Keys are walked from the last visible tile down, which
// puts the tiles that need masking first. k and v have one shared tile each:
//
//   barrier          what it orders
//   k landed         every thread's copy of k(n) is visible; all warps are done with v(n + 1)
//   v landed         every thread's copy of v(n) is visible; all warps are done with k(n)
//
// so that v(n) travels during q k^T and k(n - 1) during softmax and p v.
#pragma once

#include <attention/containment.cuh>
#include <attention/dropout.cuh>
#include <attention/head_address.cuh>
#include <attention/online_softmax.cuh>
#include <attention/score_layout.cuh>
#include <attention/score_transform.cuh>
#include <attention/visible_range.cuh>
#include <params/forward_params.h>
#include <ptx/element.cuh>
#include <tile/copy.cuh>
#include <tile/fragment.cuh>

namespace jfa::sm80 {

template <class Config>
struct ForwardShapes {
  static constexpr int kThreads = Config::kWarps * 32;
  static constexpr int kWarpRows = Config::kTileQ / Config::kWarps;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kKeyPairs = Config::kTileK / 16;
  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static_assert(kWarpRows % 16 == 0, "a warp owns whole 16-row blocks");

  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<Config::kTileK, Config::kHeadDim>;
  static constexpr int kKeyOffset = QueryTile::kBytes;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kSharedBytes = kValueOffset + KeyTile::kBytes;

  using Scores = tile::Accumulator<kRowTiles, kKeyPairs>;
  using Out = tile::Accumulator<kRowTiles, kHeadDimSteps>;
  using Probs = tile::RegisterOperand<kRowTiles, kKeyPairs>;
  using Layout = attention::ScoreLayout<16, 16>;
};

template <class Config>
__device__ __forceinline__ attention::GridPlace query_tile_place(const AttentionParams& params) {
  const int query_tiles = (params.seqlen_q + Config::kTileQ - 1) / Config::kTileQ;
  attention::GridPlace place(query_tiles, params.heads);
  // Under a causal mask the last queries see the most keys: the longest tiles start first, and the
  // short ones fill the gaps at the end.
  if constexpr (Config::kWindowed) place.tile = query_tiles - 1 - place.tile;
  return place;
}

// out rows, rounded and staged in the query tile's memory (each warp in its own rows), and lse.
template <class Config, class Out>
__device__ __forceinline__ void write_rows(const ForwardParams& params, unsigned char* staging,
                                           Out& out,
                                           attention::OnlineSoftmax<Out::kRowTiles>& softmax,
                                           float exponent_scale) {
  using Shapes = ForwardShapes<Config>;
  const attention::GridPlace place = query_tile_place<Config>(params.attention);
  const int first_query = place.tile * Config::kTileQ;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * Shapes::kWarpRows;
  const int lane = threadIdx.x % 32;
  float lse[Out::kRowTiles][2];
  softmax.finish(lse, exponent_scale);
#pragma unroll
  for (int m = 0; m < Out::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = softmax.sum[m][half];
      float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      if constexpr (Config::kDropout) inverse *= params.attention.dropout_scale;
#pragma unroll
      for (int n = 0; n < Out::kColumnTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) out.values[m][n][2 * half + c] *= inverse;
      const int query = first_query + warp_row + m * 16 + lane / 4 + 8 * half;
      if (lane % 4 == 0 && query < params.attention.seqlen_q) {
        const long long row =
            static_cast<long long>(place.batch) * params.attention.heads + place.head;
        params.lse[row * params.attention.seqlen_q + query] = lse[m][half];
      }
    }
  tile::store_accumulator<typename Config::Element, typename Shapes::QueryTile, 16, 1>(
      tile::shared_address(staging), 0, out, warp_row, 0);
  // store_rows reads rows that other warps staged
  const bool spoilt = attention::barrier_any_spoilt<Config>(!out.is_finite());
  tile::store_rows<typename Shapes::QueryTile, Config::kHeadDim, Shapes::kThreads>(
      staging, attention::head_address(params.out, place.batch, place.head), params.out.row_stride,
      first_query, params.attention.seqlen_q);
  if constexpr (Config::kWindowed) {
    if (spoilt) {
      __syncthreads();  // contain_out reads rows that other warps stored
      attention::contain_out<Config>(
          params, place.batch, place.head, first_query,
          {first_query + static_cast<int>(threadIdx.x) / 32, first_query + Config::kTileQ},
          Config::kWarps);
    }
  }
}

template <class Config>
__device__ __forceinline__ void forward(const ForwardParams& params, unsigned char* shared) {
  using Shapes = ForwardShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  using tile::SubTileOrder;
  const AttentionParams& attention = params.attention;

  const attention::GridPlace place = query_tile_place<Config>(attention);
  const int first_query = place.tile * Config::kTileQ;
  const int head_k = place.head / (attention.heads / attention.heads_k);

  const attention::VisibleRange<Config> range(attention);
  const attention::Range key_tiles = range.key_tiles(first_query);
  const attention::ScoreTransform<Config> transform(attention, place.batch, place.head);

  const unsigned q_shared = tile::shared_address(shared);
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * Shapes::kWarpRows;

  // The tile's first row goes into the pointer, which is the same for all threads and costs none of
  // their registers.
  const auto load_keys = [&](const TensorView& view, int tile_offset, int key_tile) {
    const int first_key = key_tile * Config::kTileK;
    tile::load_rows_async<KeyTile, Config::kHeadDim, Shapes::kThreads>(
        q_shared, tile_offset,
        attention::head_address(view, place.batch, head_k) +
            static_cast<long long>(first_key) * view.row_stride,
        view.row_stride, 0, attention.seqlen_k - first_key);
    ptx::cp_async_commit();
  };

  typename Shapes::Out out;
  out.clear();
  attention::OnlineSoftmax<Shapes::kRowTiles> softmax;

  if (!key_tiles.empty()) {
    tile::load_rows_async<QueryTile, Config::kHeadDim, Shapes::kThreads>(
        q_shared, 0, attention::head_address(attention.q, place.batch, place.head),
        attention.q.row_stride, first_query, attention.seqlen_q);
    load_keys(attention.k, Shapes::kKeyOffset, key_tiles.end - 1);
  }

  const tile::RowOperand<QueryTile, 16> q_operand{{q_shared, 0, warp_row}};
  const tile::TransposedOperand<KeyTile, 16> k_operand{{q_shared, Shapes::kKeyOffset, 0}};
  const tile::StraightOperand<KeyTile, 1> v_operand{{q_shared, Shapes::kValueOffset, 0}};

#pragma unroll 1
  for (int key_tile = key_tiles.end - 1; key_tile >= key_tiles.begin; --key_tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // k landed
    load_keys(attention.v, Shapes::kValueOffset, key_tile);

    typename Shapes::Scores scores;
    scores.clear();
    tile::multiply_accumulate<Element, Shapes::kHeadDimSteps, Config::kScoreUnroll>(
        scores, q_operand, k_operand);

    ptx::cp_async_wait<0>();
    __syncthreads();  // v landed
    if (key_tile > key_tiles.begin) load_keys(attention.k, Shapes::kKeyOffset, key_tile - 1);

    const int first_key = key_tile * Config::kTileK;
    const typename Shapes::Layout layout(first_query + warp_row, first_key);
    transform.apply(scores, layout);
    if (range.cuts(first_query, first_key)) {
      attention::mask_scores(scores, layout, attention::VisibleRange<Config>(attention));
    }
    softmax.update(scores, out, transform.exponent_scale);
    if constexpr (Config::kDropout) {
      // After the row sums are taken; the scale 1 / (1 - p) is applied to out.
      attention::Dropout(attention, place.batch, place.head)
          .template for_each<typename Shapes::Scores>(layout, [&](int m, int n, int i, bool kept) {
            if (!kept) scores.values[m][n][i] = 0.0f;
          });
    }
    typename Shapes::Probs probs;
    probs.template pack<Element>(scores);
    tile::multiply_accumulate<Element, Shapes::kKeyPairs>(out, probs, v_operand);
  }

  write_rows<Config>(params, shared, out, softmax, transform.exponent_scale);
}

}  // namespace jfa::sm80
