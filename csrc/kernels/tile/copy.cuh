// Copies between global memory and shared tiles by all threads of a CTA, 16 bytes at a time.
#pragma once

#include <ptx/cp_async.cuh>
#include <tile/shared_tile.cuh>

namespace jfa::tile {

// How kThreads threads cover the 16-byte chunks of a tile: eight neighbouring threads take a row of
// a panel, 128 contiguous bytes of global memory. A pass covers whole swizzle atoms, so a thread's
// place in the swizzle is the same in every pass.
template <class Tile, int kHeadDim, int kThreads>
struct ChunkWalk {
  static constexpr int kRowsPerPass = kThreads / 8;
  static constexpr int kPasses = Tile::kRows / kRowsPerPass;
  static_assert(kRowsPerPass % 8 == 0 && Tile::kRows % kRowsPerPass == 0,
                "whole passes cover the tile");

  int row = threadIdx.x / 8;
  int chunk = threadIdx.x % 8;

  __device__ __forceinline__ bool in_head_dim(int panel) const {
    return (panel + 1) * kPanelColumns <= kHeadDim ||
           panel * kPanelColumns + chunk * kChunkColumns < kHeadDim;
  }
};

// Starts the copy of rows [first_row, min(first_row + Tile::kRows, rows)) of a row-major matrix
// into the tile that starts tile_offset bytes behind origin; the rest of the tile is filled with
// zeros and nothing behind the matrix is read. Tiles of one origin share the register of a thread's
// place. Threads: all of the CTA. Effect: leaves cp.async operations to be committed by the caller.
template <class Tile, int kHeadDim, int kThreads>
__device__ __forceinline__ void load_rows_async(unsigned origin, unsigned tile_offset,
                                                const unsigned short* matrix, int row_stride,
                                                int first_row, int rows) {
  using Walk = ChunkWalk<Tile, kHeadDim, kThreads>;
  const Walk walk;
  const int row = first_row + walk.row;
  const unsigned short* source =
      matrix + (static_cast<long long>(row) * row_stride + walk.chunk * kChunkColumns);
  // A thread's first chunk lies in the first panel.
  const unsigned target = origin + walk.row * kPanelRowBytes + ((walk.chunk ^ (walk.row % 8)) * 16);
#pragma unroll
  for (int pass = 0; pass < Walk::kPasses; ++pass) {
    const bool valid = row + pass * Walk::kRowsPerPass < rows;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      ptx::cp_async_16(target + (tile_offset + pass * Walk::kRowsPerPass * kPanelRowBytes +
                                 panel * Tile::kPanelBytes),
                       source + panel * kPanelColumns, valid && walk.in_head_dim(panel));
    }
    source += static_cast<long long>(Walk::kRowsPerPass) * row_stride;
  }
}

// Writes a tile to rows [first_row, min(first_row + Tile::kRows, rows)) of a row-major matrix.
// Threads: all of the CTA. Needs: a barrier between the tile's writers and this call.
template <class Tile, int kHeadDim, int kThreads>
__device__ __forceinline__ void store_rows(const unsigned char* tile, unsigned short* matrix,
                                           int row_stride, int first_row, int rows) {
  using Walk = ChunkWalk<Tile, kHeadDim, kThreads>;
  const Walk walk;
  const int row = first_row + walk.row;
  unsigned short* target =
      matrix + (static_cast<long long>(row) * row_stride + walk.chunk * kChunkColumns);
  const unsigned char* source = tile + Tile::offset(walk.row, walk.chunk);
#pragma unroll
  for (int pass = 0; pass < Walk::kPasses; ++pass) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      if (row + pass * Walk::kRowsPerPass < rows && walk.in_head_dim(panel)) {
        *reinterpret_cast<uint4*>(target + panel * kPanelColumns) = *reinterpret_cast<const uint4*>(
            source + pass * Walk::kRowsPerPass * kPanelRowBytes + panel * Tile::kPanelBytes);
      }
    }
    target += static_cast<long long>(Walk::kRowsPerPass) * row_stride;
  }
}

}  // namespace jfa::tile
