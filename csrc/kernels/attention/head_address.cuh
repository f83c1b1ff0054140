// Addresses of one (batch, head) of a tensor and of per-head vectors. 64-bit throughout: 128k
// tokens of 128 heads of 128 already have 2^31 elements.
#pragma once

#include <params/backward_params.h>
#include <params/tensor_view.h>
#include <ptx/special_register.cuh>

namespace jfa::attention {

// Which of a tensor's `batches` serves a batch of the call. Nearly always the same: a comparison in
// place of a division, for which a CTA that starts would wait.
__device__ __forceinline__ int own_batch(int batch, int batches) {
  return __builtin_expect(batch < batches, true) ? batch : batch % batches;
}

__device__ __forceinline__ unsigned short* head_address(const TensorView& view, int batch,
                                                        int head) {
  return static_cast<unsigned short*>(view.data) +
         own_batch(batch, view.batches) * view.batch_stride +
         static_cast<long long>(head) * view.head_stride;
}

// Row `query` of a head in the workspace of the backward.
__device__ __forceinline__ long long workspace_row(const BackwardParams& params, int batch,
                                                   int head, int query) {
  return static_cast<long long>(batch * params.attention.heads + head) * params.padded_rows + query;
}

// Where a tile of queries or of keys lies.
struct TilePlace {
  int tile;
  int head;
  int batch;
};

// Of (tile, head, batch), the tile fastest.
__device__ __forceinline__ TilePlace place_of(unsigned index, int tiles, int heads) {
  const unsigned head = index / tiles;
  return {static_cast<int>(index % tiles), static_cast<int>(head % heads),
          static_cast<int>(head / heads)};
}

// A CTA's place in a grid of (tile, head, batch) with the tile fastest, as one dimension: the
// batch that vmap folds together may pass the 65,535 limit of the other grid dimensions.
// It is cheap to compute and costs registers to keep: kernels make one before their main loop and
// another behind it.
struct GridPlace : TilePlace {
  __device__ __forceinline__ GridPlace(int tiles, int heads)
      : TilePlace(place_of(ptx::reread_cta(), tiles, heads)) {}
};

}  // namespace jfa::attention
