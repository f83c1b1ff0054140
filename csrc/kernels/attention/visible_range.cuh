// Which keys a run of queries can see, which queries can see a run of keys, and which tiles of the
// score matrix the mask cuts. Query i sees key j where
//   i + diagonal - window_left <= j <= i + diagonal + window_right  and  j < seqlen_k.
// A side without a limit comes as a window longer than any sequence: one kernel serves causal masks
// and windows of every kind, and tiles that no limit cuts are not masked.
#pragma once

#include <params/attention_params.h>

namespace jfa::attention {

struct Range {
  int begin;
  int end;

  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

template <class Config>
struct VisibleRange {
  int seqlen_q;
  int seqlen_k;
  int left;   // key j is visible to query i only if j >= i + left
  int right;  // and only if j <= i + right

  __device__ __forceinline__ explicit VisibleRange(const AttentionParams& params)
      : seqlen_q(params.seqlen_q),
        seqlen_k(params.seqlen_k),
        left(params.diagonal - params.window_left),
        right(params.diagonal + params.window_right) {}

  // The keys that a query sees, first and last.
  __device__ __forceinline__ int first_visible(int query) const {
    return Config::kWindowed ? query + left : 0;
  }
  __device__ __forceinline__ int last_visible(int query) const {
    return Config::kWindowed ? min(seqlen_k - 1, query + right) : seqlen_k - 1;
  }

  // The queries that see a key, first and last; none see a key that does not exist. Queries that
  // do not exist have no probabilities to hide.
  __device__ __forceinline__ int first_seeing(int key) const {
    return Config::kWindowed ? key - right : 0;
  }
  __device__ __forceinline__ int last_seeing(int key) const {
    if (key >= seqlen_k) return -1;
    return Config::kWindowed ? min(seqlen_q - 1, key - left) : seqlen_q - 1;
  }

  __device__ __forceinline__ Range visible_keys(int query) const {
    return {max(0, first_visible(query)), last_visible(query) + 1};
  }

  // The queries that see a key.
  __device__ __forceinline__ Range seeing_queries(int key) const {
    return {max(0, key - right), min(seqlen_q, key - left + 1)};
  }

  // Key tiles that some query of [first_query, first_query + kTileQ) sees.
  __device__ __forceinline__ Range key_tiles(int first_query) const {
    const int last_query = min(first_query + Config::kTileQ, seqlen_q) - 1;
    const int begin = Config::kWindowed ? max(0, first_query + left) : 0;
    const int end = Config::kWindowed ? min(seqlen_k, last_query + right + 1) : seqlen_k;
    if (begin >= end) return {0, 0};
    return {begin / Config::kTileK, (end + Config::kTileK - 1) / Config::kTileK};
  }

  // Query tiles that see some key of [first_key, first_key + kTileK).
  __device__ __forceinline__ Range query_tiles(int first_key) const {
    const int last_key = min(first_key + Config::kTileK, seqlen_k) - 1;
    const int begin = Config::kWindowed ? max(0, first_key - right) : 0;
    const int end = Config::kWindowed ? min(seqlen_q, last_key - left + 1) : seqlen_q;
    if (begin >= end) return {0, 0};
    return {begin / Config::kTileQ, (end + Config::kTileQ - 1) / Config::kTileQ};
  }

  // Whether some score of a tile of kRows queries is hidden.
  template <int kRows = Config::kTileQ>
  __device__ __forceinline__ bool cuts(int first_query, int first_key) const {
    const int last_key = first_key + Config::kTileK - 1;
    const int last_query = first_query + kRows - 1;
    return last_key >= seqlen_k ||
           (Config::kWindowed && (last_key > first_query + right || first_key < last_query + left));
  }
};

}  // namespace jfa::attention
