// How persistent CTAs deal the tiles of a call out among themselves.
#pragma once

#include <params/attention_params.h>

#include <cstdint>

#include "launchers/attention_spec.h"

namespace jax_flash_attn::launchers {

jfa::DealtTiles deal_query_tiles(const AttentionShape& shape, int tile_q);
jfa::DealtTiles deal_key_tiles(const AttentionShape& shape, int tile_k);

}  // namespace jax_flash_attn::launchers
