// What the tile tables of the kernel families share.
#pragma once

#include "launchers/attention_spec.h"

namespace jax_flash_attn::launchers {

constexpr int kAnyHeadDim = 256;

// What a row of a table serves: kPlain is no dropout, ALiBi, softcap or unusual scale, all of which
// hold more values per score in registers; kFull is kPlain without a mask; kNoDropout and
// kNoSoftcap are all but that one.
enum class Features { kFull, kPlain, kNoDropout, kNoSoftcap, kAny };

bool serves(Features features, const AttentionSpec& spec);

// tile/shared_tile.cuh: whole panels of 64 columns of 16-bit elements.
constexpr int tile_bytes(int rows, int columns) { return rows * ((columns + 63) / 64) * 128; }

}  // namespace jax_flash_attn::launchers
