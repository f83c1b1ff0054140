#include "launchers/tile_table.h"

namespace jax_flash_attn::launchers {

bool serves(Features features, const AttentionSpec& spec) {
  const bool plain =
      !spec.alibi && !spec.dropout() && spec.softcap == 0.0 && spec.softmax_scale > 0.0;
  switch (features) {
    case Features::kFull:
      return plain && !spec.windowed();
    case Features::kPlain:
      return plain;
    case Features::kMasked:
      return spec.windowed();
    case Features::kNoDropout:
      return !spec.dropout();
    case Features::kNoSoftcap:
      return spec.softcap == 0.0;
    case Features::kAny:
      break;
  }
  return true;
}

}  // namespace jax_flash_attn::launchers
