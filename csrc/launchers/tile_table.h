// What the tile tables of the kernel families share.
#pragma once

#include <cstdint>

#include "launchers/attention_spec.h"

namespace jax_flash_attn::launchers {

constexpr int kAnyHeadDim = 256;

// What a row of a table serves: kPlain is no dropout, ALiBi, softcap or unusual scale, all of which
// hold more values per score in registers; kFull is kPlain without a mask; kMasked is any call with
// one; kNoDropout and kNoSoftcap are all but that one.
enum class Features { kFull, kPlain, kMasked, kNoDropout, kNoSoftcap, kAny };

bool serves(Features features, const AttentionSpec& spec);

// How many queries a row serves. A wide tile of queries on the diagonal of a causal mask computes
// much that is hidden, the more the shorter the sequence.
enum class Lengths { kShort, kAny };
constexpr std::int64_t kShortSeqlen = 1024;

inline bool is_short(const AttentionShape& shape) { return shape.seqlen_q <= kShortSeqlen; }

// tile/shared_tile.cuh: whole panels of 64 columns of 16-bit elements.
constexpr int tile_bytes(int rows, int columns) { return rows * ((columns + 63) / 64) * 128; }

}  // namespace jax_flash_attn::launchers
