// Gradients from accumulators to memory.
#pragma once

#include <attention/head_address.cuh>
#include <params/backward_params.h>
#include <tile/write_rows.cuh>

namespace jfa::sm90 {

// The 16 rows of dq that a warp has, scaled. Threads: a whole warp.
template <class Config, class Gradient>
__device__ __forceinline__ void store_query_gradient(const BackwardParams& params, int batch,
                                                     int head, int first_query, Gradient& dq) {
  dq.scale(params.attention.softmax_scale);
  tile::write_rows<typename Config::Element, Config::kHeadDim>(
      attention::head_address(params.dq, batch, head) +
          static_cast<long long>(first_query) * params.dq.row_stride,
      params.dq.row_stride, params.attention.seqlen_q - first_query, dq);
}

// Zeros for a tile of a gradient. Threads: whole warps, each its own of `warps`.
template <class Config>
__device__ __forceinline__ void clear_rows(const TensorView& gradient,
                                           const attention::TilePlace& place, int tile_rows,
                                           int seqlen, int warp, int warps) {
  constexpr int kWords = Config::kHeadDim / 4;  // of 8 bytes, on which rows start
  unsigned short* const rows = attention::head_address(gradient, place.batch, place.head);
  const int end = min((place.tile + 1) * tile_rows, seqlen);
#pragma unroll 1
  for (int row = place.tile * tile_rows + warp; row < end; row += warps)
    for (int word = static_cast<int>(threadIdx.x) % 32; word < kWords; word += 32)
      reinterpret_cast<uint2*>(rows + static_cast<long long>(row) * gradient.row_stride)[word] =
          make_uint2(0, 0);
}

}  // namespace jfa::sm90
