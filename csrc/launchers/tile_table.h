// What the tile tables of the kernel families share.
#pragma once

#include <cstdint>
#include <limits>

#include "launchers/attention_spec.h"

namespace jax_flash_attn::launchers {

constexpr int kAnyHeadDim = 256;

// What a row of a table serves: kPlain is no dropout, ALiBi, softcap or unusual scale, all of which
// hold more values per score in registers; kFull is kPlain without a mask; kMasked is any call with
// one; kNoDropout and kNoSoftcap are all but that one.
enum class Features { kFull, kPlain, kMasked, kNoDropout, kNoSoftcap, kAny };

bool serves(Features features, const AttentionSpec& spec);

// The numbers of queries up to which the tables may choose otherwise than beyond. A call's plan
// serves all calls of its length class: how many of the limits are below its number of queries.
constexpr std::int64_t kSeqlenLimits[] = {512, 768, 1024, 4096};
constexpr std::int64_t kAnySeqlen = std::numeric_limits<std::int64_t>::max();

constexpr int length_class(std::int64_t seqlen_q) {
  int passed = 0;
  for (const std::int64_t limit : kSeqlenLimits) passed += seqlen_q > limit ? 1 : 0;
  return passed;
}

// Whether a table may tell lengths apart there.
constexpr bool is_seqlen_limit(std::int64_t seqlen) {
  return seqlen == kAnySeqlen || length_class(seqlen) != length_class(seqlen + 1);
}

// tile/shared_tile.cuh: whole panels of 64 columns of 16-bit elements.
constexpr int tile_bytes(int rows, int columns) { return rows * ((columns + 63) / 64) * 128; }

}  // namespace jax_flash_attn::launchers
