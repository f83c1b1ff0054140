#include "launchers/plan_table.h"

#include "launchers/tile_override.h"
#include "launchers/tile_table.h"

namespace jax_flash_attn::launchers {

PlanKey plan_key(const AttentionSpec& spec, const AttentionShape& shape, int device) {
  const bool bits[] = {
      shape.element == Element::kFloat16,
      spec.windowed(),
      spec.causal(),
      spec.softcap > 0.0,
      spec.alibi,
      spec.dropout(),
      spec.softmax_scale > 0.0,
      spec.deterministic,
  };
  std::int32_t features = length_class(shape.seqlen_q);
  for (const bool bit : bits) features = 2 * features + (bit ? 1 : 0);
  return {{device, tile_setting(), static_cast<std::int32_t>(shape.head_dim), features}};
}

std::size_t PlanKeyHash::operator()(const PlanKey& key) const {
  // FNV-1a over the words.
  std::uint64_t hash = 14695981039346656037ull;
  for (const std::int32_t value : key.values)
    hash = (hash ^ static_cast<std::uint32_t>(value)) * 1099511628211ull;
  return static_cast<std::size_t>(hash);
}

}  // namespace jax_flash_attn::launchers
