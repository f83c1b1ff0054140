// What one attention call computes: the members of AttentionSpec are, name for name, the fields of
// jax_flash_attn/_spec.py and the attributes of the custom calls. A test compares the lists.
#pragma once

#include <cstdint>
#include <string>

namespace jax_flash_attn::launchers {

struct AttentionSpec {
  double softmax_scale = 1.0;
  std::int64_t window_left = -1;  // -1: unbounded
  std::int64_t window_right = -1;
  bool top_left = false;
  double softcap = 0.0;  // 0: off
  bool alibi = false;
  double dropout_p = 0.0;
  bool deterministic = false;
  std::string packing = "none";  // "none", "kv", "qkv"

  bool causal() const { return window_left < 0 && window_right == 0; }
  bool windowed() const { return window_left >= 0 || window_right >= 0; }
  bool dropout() const { return dropout_p > 0.0; }
};

enum class Element { kBFloat16, kFloat16 };

struct AttentionShape {
  Element element = Element::kBFloat16;
  std::int64_t batch = 0;
  std::int64_t seqlen_q = 0;
  std::int64_t seqlen_k = 0;
  std::int64_t heads = 0;
  std::int64_t heads_k = 0;
  std::int64_t head_dim = 0;

  // Of a backward with more key heads than query heads, each with dk and dv of some queries of one
  // (csrc/kernels/attention/query_group.cuh).
  bool splits_query_heads() const { return heads_k > heads; }
  // Query heads of a key head. Needs: heads_k > 0.
  std::int64_t group_heads() const { return splits_query_heads() ? 1 : heads / heads_k; }
};

}  // namespace jax_flash_attn::launchers
