// Tensor maps: how the copy engine of Hopper and later is told what a tensor looks like.
#pragma once

#include <cstdint>

#include "runtime/driver_api.h"
#include "runtime/status.h"

namespace jax_flash_attn::runtime {

// A tensor of 16-bit elements, innermost dimension first and contiguous, copied in boxes of
// box_columns x box_rows over its two innermost dimensions. Elements outside read as zeros.
struct TensorBoxes {
  void* address;                  // a multiple of 16
  std::uint64_t dims[4];          // none of them 0
  std::uint64_t stride_bytes[3];  // of dims 1 to 3, multiples of 16
  std::uint32_t box_columns;      // 64: rows of 128 bytes, which is what the swizzle spans
  std::uint32_t box_rows;         // at most 256
};

// Pure host arithmetic in the driver: no context, no device access. The calling thread's last maps
// are kept, since the driver takes longer for one than to compare boxes.
StatusOr<CUtensorMap> encode_tensor_map(const TensorBoxes& boxes);

}  // namespace jax_flash_attn::runtime
