// Keeps NaN and infinity in the rows that attend to them.
//
// Main loops form the products of a tile whole: a hidden score has probability 0, and 0 * NaN is
// NaN. In tiles that a mask cuts, a value that is not finite so reaches rows that never see it.
// Looking for it in a main loop would cost every call. Instead a kernel asks at its end whether a
// result of its tile is not finite. Only then the tile's rows are read back, and those that a
// hidden row may have spoilt are summed anew, in fp32, over what they see alone:
//
//   row of   is spoilt by a hidden row, in a tile that was walked, of
//   out      v
//   dq       k or dout v^T
//   dk, dv   q, dout v^T, lse or delta, of what the key head walks (attention/query_group.cuh)
//
// dout v^T has the row's own dout or v in it, which counts where the row sees nothing. Without a
// mask only padding is hidden: it is zero and spoils a row that is not finite itself, and such a
// row is seen by all.
//
// One warp sums a row, from global memory: nothing here depends on how a kernel holds its tiles.
// Needs: a barrier between the kernel's stores of the results and these calls.
#pragma once

#include <attention/dropout.cuh>
#include <attention/head_address.cuh>
#include <attention/query_group.cuh>
#include <attention/score_transform.cuh>
#include <attention/visible_range.cuh>
#include <params/backward_params.h>
#include <params/forward_params.h>
#include <ptx/math.cuh>

namespace jfa::attention {

// __syncthreads() that also tells whether any thread of the CTA holds a result that is not finite.
template <class Config>
__device__ __forceinline__ bool barrier_any_spoilt(bool spoilt) {
  if constexpr (Config::kWindowed) return __syncthreads_or(spoilt);
  __syncthreads();
  return false;
}

// A row of a tensor, held by a warp: lane l has the pairs of columns l, l + 32, ...
template <class Config>
struct WarpRow {
  static constexpr int kHeadDimPairs = Config::kHeadDim / 2;
  static constexpr int kPairs = (kHeadDimPairs + 31) / 32;  // of one lane

  float values[kPairs][2] = {};

  WarpRow() = default;

  __device__ __forceinline__ explicit WarpRow(const unsigned short* row) {
    const unsigned* words = reinterpret_cast<const unsigned*>(row);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      if (pair(n) >= kHeadDimPairs) continue;
      const unsigned word = words[pair(n)];
      values[n][0] = Config::Element::low(word);
      values[n][1] = Config::Element::high(word);
    }
  }

  static __device__ __forceinline__ int pair(int n) { return threadIdx.x % 32 + 32 * n; }

  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (int n = 0; n < kPairs; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) finite &= ptx::is_finite(values[n][c]);
    return __all_sync(0xffffffffu, finite);
  }

  __device__ __forceinline__ float dot(const WarpRow& other) const {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kPairs; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) sum = fmaf(values[n][c], other.values[n][c], sum);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  }
};

__device__ __forceinline__ unsigned short* row_address(const TensorView& view, int batch, int head,
                                                       int row) {
  return head_address(view, batch, head) + static_cast<long long>(row) * view.row_stride;
}

// A row of a result whose columns are summed anew where they are not finite. The other columns are
// right: 0 * NaN is the only way in which a hidden row reaches one.
template <class Config>
struct RecomputedRow {
  using Row = WarpRow<Config>;
  unsigned short* address;
  Row stored;
  Row sum;

  __device__ __forceinline__ explicit RecomputedRow(unsigned short* row)
      : address(row), stored(row) {}

  __device__ __forceinline__ void add(float weight, const Row& row) {
#pragma unroll
    for (int n = 0; n < Row::kPairs; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        sum.values[n][c] = fmaf(weight, row.values[n][c], sum.values[n][c]);
  }

  // Whether no further term can change the row: a sum that is NaN stays NaN.
  __device__ __forceinline__ bool is_settled() const {
    bool settled = true;
#pragma unroll
    for (int n = 0; n < Row::kPairs; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        settled &= ptx::is_finite(stored.values[n][c]) || ptx::is_nan(sum.values[n][c]);
    return __all_sync(0xffffffffu, settled);
  }

  __device__ __forceinline__ void store(float scale) const {
#pragma unroll
    for (int n = 0; n < Row::kPairs; ++n) {
      if (Row::pair(n) >= Row::kHeadDimPairs) continue;
      float columns[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float value = stored.values[n][c];
        columns[c] = ptx::is_finite(value) ? value : sum.values[n][c] * scale;
      }
      reinterpret_cast<unsigned*>(address)[Row::pair(n)] =
          Config::Element::pack(columns[0], columns[1]);
    }
  }
};

// Whether spoils(i) holds for an i that lies in `walked` but not in `visible`, a part of it.
template <class Spoils>
__device__ __forceinline__ bool any_hidden(Range walked, Range visible, Spoils spoils) {
#pragma unroll 1
  for (int i = walked.begin; i < walked.end; ++i) {
    if (i == visible.begin && !visible.empty()) i = visible.end;
    if (i < walked.end && spoils(i)) return true;
  }
  return false;
}

template <class Config>
__device__ __forceinline__ bool is_kept(const AttentionParams& params, int batch, int head,
                                        int query, int key) {
  if constexpr (Config::kDropout) return Dropout(params, batch, head).is_kept(query, key);
  return true;
}

// Contains the rows of out of every stride-th of `queries`, which lie in the query tile that starts
// at first_query.
// Threads: a whole warp.
template <class Config>
__device__ __forceinline__ void contain_out(const ForwardParams& params, int batch, int head,
                                            int first_query, Range queries, int stride) {
  const AttentionParams& attention = params.attention;
  const VisibleRange<Config> range(attention);
  const ScoreTransform<Config> transform(attention, batch, head);
  const Range tiles = range.key_tiles(first_query);
  const Range walked{tiles.begin * Config::kTileK,
                     min(tiles.end * Config::kTileK, attention.seqlen_k)};
  const int head_k = head / (attention.heads / attention.heads_k);
  const int end_query = min(queries.end, attention.seqlen_q);
#pragma unroll 1
  for (int query = queries.begin; query < end_query; query += stride) {
    RecomputedRow<Config> out(row_address(params.out, batch, head, query));
    const long long row = static_cast<long long>(batch) * attention.heads + head;
    const float lse = params.lse[row * attention.seqlen_q + query];
    // Hidden keys don't enter lse: where it is NaN, the row sees what made it so.
    if (out.stored.is_finite() || ptx::is_nan(lse)) continue;
    const Range visible = range.visible_keys(query);
    const auto value = [&](int key) {
      return WarpRow<Config>(row_address(attention.v, batch, head_k, key));
    };
    if (!any_hidden(walked, visible, [&](int key) { return !value(key).is_finite(); })) continue;

    const WarpRow<Config> q(row_address(attention.q, batch, head, query));
    // Against +inf, the probabilities of a row that has none are 0.
    const float lse_log2 = lse == -ptx::infinity() ? ptx::infinity() : lse * ptx::kLog2E;
#pragma unroll 1
    for (int key = visible.begin; key < visible.end && !out.is_settled(); ++key) {
      const WarpRow<Config> k(row_address(attention.k, batch, head_k, key));
      const float prob = transform.prob(transform.score(q.dot(k), query, key), lse_log2);
      const bool kept = is_kept<Config>(attention, batch, head, query, key);
      out.add(kept ? prob : 0.0f, value(key));
    }
    out.store(Config::kDropout ? attention.dropout_scale : 1.0f);
  }
}

// A query's and a key's side of the backward.
template <class Config>
struct QuerySide {
  WarpRow<Config> q;
  WarpRow<Config> dout;
  float lse_log2;
  float delta;

  __device__ __forceinline__ QuerySide(const BackwardParams& params, int batch, int head, int query)
      : q(row_address(params.attention.q, batch, head, query)),
        dout(row_address(params.dout, batch, head, query)) {
    const long long row = workspace_row(params, batch, head, query);
    lse_log2 = params.lse_log2[row];
    delta = params.delta[row];
  }
};

template <class Config>
struct KeySide {
  WarpRow<Config> k;
  WarpRow<Config> v;

  __device__ __forceinline__ KeySide(const AttentionParams& params, int batch, int head_k, int key)
      : k(row_address(params.k, batch, head_k, key)),
        v(row_address(params.v, batch, head_k, key)) {}
};

// Whether a query and a key that are hidden from each other spoil each other's gradients.
template <class Config>
__device__ __forceinline__ bool spoil_each_other(const QuerySide<Config>& query,
                                                 const KeySide<Config>& key) {
  return ptx::is_nan(query.lse_log2) || !ptx::is_finite(query.delta) ||
         !ptx::is_finite(query.dout.dot(key.v)) || !query.q.is_finite() || !key.k.is_finite();
}

// What a query and a key that see each other contribute.
struct PairGradient {
  float kept_prob;  // 0 where dropped
  float dscore;

  template <class Config>
  __device__ __forceinline__ PairGradient(const AttentionParams& params, int batch, int head,
                                          int query, const QuerySide<Config>& query_side, int key,
                                          const KeySide<Config>& key_side) {
    const ScoreTransform<Config> transform(params, batch, head);
    const float score = transform.score(query_side.q.dot(key_side.k), query, key);
    const float prob = transform.prob(score, query_side.lse_log2);
    const bool kept = is_kept<Config>(params, batch, head, query, key);
    kept_prob = kept ? prob : 0.0f;
    float dprob = query_side.dout.dot(key_side.v);
    if constexpr (Config::kDropout) dprob = kept ? dprob * params.dropout_scale : 0.0f;
    dscore = transform.dscore(prob, dprob, query_side.delta, query_side.lse_log2, query, key);
  }
};

// Contains the rows of dq of every stride-th of `queries`, which lie in the query tile that starts
// at first_query. The key tiles that have added to them are those with a visible pair, the same for
// a walk over queries as for one over keys. Threads: a whole warp.
template <class Config>
__device__ __forceinline__ void contain_dq(const BackwardParams& params, int batch, int head,
                                           int first_query, Range queries, int stride) {
  const AttentionParams& attention = params.attention;
  const VisibleRange<Config> range(attention);
  const Range tiles = range.key_tiles(first_query);
  const Range walked{tiles.begin * Config::kTileK,
                     min(tiles.end * Config::kTileK, attention.seqlen_k)};
  const int head_k = head / key_head_group(params);
  const int end_query = min(queries.end, attention.seqlen_q);
#pragma unroll 1
  for (int query = queries.begin; query < end_query; query += stride) {
    RecomputedRow<Config> dq(row_address(params.dq, batch, head, query));
    if (dq.stored.is_finite()) continue;
    const QuerySide<Config> query_side(params, batch, head, query);
    // Hidden keys enter neither: where one is not finite, so is dq.
    if (ptx::is_nan(query_side.lse_log2) || !ptx::is_finite(query_side.delta)) continue;
    const Range visible = range.visible_keys(query);
    const auto spoils = [&](int key) {
      return spoil_each_other(query_side, KeySide<Config>(attention, batch, head_k, key));
    };
    if (!any_hidden(walked, visible, spoils)) continue;

#pragma unroll 1
    for (int key = visible.begin; key < visible.end && !dq.is_settled(); ++key) {
      const KeySide<Config> key_side(attention, batch, head_k, key);
      const PairGradient pair(attention, batch, head, query, query_side, key, key_side);
      dq.add(pair.dscore, key_side.k);
    }
    dq.store(attention.softmax_scale);
  }
}

// Contains the rows of dk and dv of every stride-th of `keys`, whatever CTAs computed them.
// Threads: a whole warp.
template <class Config>
__device__ __forceinline__ void contain_dk_dv(const BackwardParams& params, int batch, int head_k,
                                              Range keys, int stride) {
  const AttentionParams& attention = params.attention;
  const VisibleRange<Config> range(attention);
  const int first_head = first_query_head(attention, head_k);
  const Range heads{first_head, first_head + group_heads<Config>(attention)};
#pragma unroll 1
  for (int key = keys.begin; key < min(keys.end, attention.seqlen_k); key += stride) {
    RecomputedRow<Config> dk(row_address(params.dk, batch, head_k, key));
    RecomputedRow<Config> dv(row_address(params.dv, batch, head_k, key));
    if (dk.stored.is_finite() && dv.stored.is_finite()) continue;
    const KeySide<Config> key_side(attention, batch, own_key_head(params, head_k), key);
    const Range tiles = own_query_tiles<Config>(
        attention, head_k, range.query_tiles(key / Config::kTileK * Config::kTileK));
    const Range walked{tiles.begin * Config::kTileQ,
                       min(tiles.end * Config::kTileQ, attention.seqlen_q)};
    const Range seeing = range.seeing_queries(key);
    const Range visible{max(seeing.begin, walked.begin), min(seeing.end, walked.end)};
    bool spoilt = false;
#pragma unroll 1
    for (int head = heads.begin; head < heads.end && !spoilt; ++head)
      spoilt = any_hidden(walked, visible, [&](int query) {
        return spoil_each_other(QuerySide<Config>(params, batch, head, query), key_side);
      });
    if (!spoilt) continue;

#pragma unroll 1
    for (int head = heads.begin; head < heads.end; ++head)
#pragma unroll 1
      for (int query = visible.begin; query < visible.end && !(dk.is_settled() && dv.is_settled());
           ++query) {
        const QuerySide<Config> query_side(params, batch, head, query);
        const PairGradient pair(attention, batch, head, query, query_side, key, key_side);
        dk.add(pair.dscore, query_side.q);
        dv.add(pair.kept_prob, query_side.dout);
      }
    dk.store(attention.softmax_scale);
    dv.store(Config::kDropout ? attention.dropout_scale : 1.0f);
  }
}

// What a postprocess kernel does behind its stores: contains dq of its query tile, where a row of
// it is not finite, and its share of dk and dv, where the main kernel left a mark. Threads: all of
// the CTA, which has `warps` warps.
template <class Config>
__device__ __forceinline__ void contain_gradients(const BackwardParams& params,
                                                  const TilePlace& place, bool spoilt, int warps) {
  if constexpr (Config::kWindowed) {
    const AttentionParams& attention = params.attention;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (spoilt) {
      __syncthreads();  // contain_dq reads rows that other warps stored
      const int first_query = place.tile * Config::kTileQ;
      contain_dq<Config>(params, place.batch, place.head, first_query,
                         {first_query + warp, first_query + Config::kTileQ}, warps);
    }
    // The CTAs of a group share the keys of its head.
    const int group = group_heads<Config>(attention);
    const int first_head = place.head / group * group;
    if (params.spoilt[place.batch * attention.heads + first_head] != 0) {
      const int query_tiles = (attention.seqlen_q + Config::kTileQ - 1) / Config::kTileQ;
      const int cta = place.head % group * query_tiles + place.tile;
      const int parts = query_parts(attention);
      const int first_head_k = first_head / group * parts;
#pragma unroll 1
      for (int head_k = first_head_k; head_k < first_head_k + parts; ++head_k)
        contain_dk_dv<Config>(params, place.batch, head_k, {cta * warps + warp, attention.seqlen_k},
                              group * query_tiles * warps);
    }
  }
}

}  // namespace jfa::attention
