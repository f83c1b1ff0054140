// Copies between global memory and shared tiles by all threads of a CTA, 16 bytes at a time.
#pragma once

#include <ptx/cp_async.cuh>
#include <tile/shared_tile.cuh>

namespace jfa::tile {

// How kThreads threads cover the 16-byte chunks of a tile: neighbouring threads take neighbouring
// chunks of a row, so that a warp's accesses are contiguous in global memory.
template <class Tile, int kHeadDim, int kThreads>
struct ChunkWalk {
  static constexpr int kChunksPerRow = Tile::kColumns / kChunkColumns;
  static constexpr int kRowsPerPass = kThreads / kChunksPerRow;
  static constexpr int kPasses = Tile::kRows / kRowsPerPass;
  static_assert(kThreads % kChunksPerRow == 0, "a pass covers whole rows");
  static_assert(Tile::kRows % kRowsPerPass == 0, "whole passes cover the tile");

  int row = threadIdx.x / kChunksPerRow;
  int chunk = threadIdx.x % kChunksPerRow;

  __device__ __forceinline__ bool in_head_dim() const {
    return kHeadDim == Tile::kColumns || chunk * kChunkColumns < kHeadDim;
  }
};

// Starts the copy of rows [0, rows_valid) of a row-major matrix into a tile; the rest of the tile
// is filled with zeros and nothing behind the matrix is read.
// Threads: all of the CTA. Effect: leaves cp.async operations to be committed by the caller.
template <class Tile, int kHeadDim, int kThreads>
__device__ __forceinline__ void load_rows_async(unsigned tile, const unsigned short* matrix,
                                                long long row_stride, int rows_valid) {
  const ChunkWalk<Tile, kHeadDim, kThreads> walk;
  using Walk = ChunkWalk<Tile, kHeadDim, kThreads>;
  const unsigned short* source = matrix + walk.row * row_stride + walk.chunk * kChunkColumns;
  const unsigned destination = tile + Tile::offset(walk.row, walk.chunk);
  // The swizzle repeats every eight rows, so a pass of whole atoms keeps the lane's offset.
  constexpr bool kKeepsSwizzle = Walk::kRowsPerPass % 8 == 0;
#pragma unroll
  for (int pass = 0; pass < Walk::kPasses; ++pass) {
    const int row = walk.row + pass * Walk::kRowsPerPass;
    const bool valid = row < rows_valid && walk.in_head_dim();
    const unsigned target = kKeepsSwizzle
                                ? destination + pass * Walk::kRowsPerPass * kPanelRowBytes
                                : tile + Tile::offset(row, walk.chunk);
    ptx::cp_async_16(target, source, valid);
    source += Walk::kRowsPerPass * row_stride;
  }
}

// Writes rows [0, rows_valid) of a tile to a row-major matrix.
// Threads: all of the CTA. Needs: a barrier between the tile's writers and this call.
template <class Tile, int kHeadDim, int kThreads>
__device__ __forceinline__ void store_rows(const unsigned char* tile, unsigned short* matrix,
                                           long long row_stride, int rows_valid) {
  using Walk = ChunkWalk<Tile, kHeadDim, kThreads>;
  const Walk walk;
#pragma unroll
  for (int pass = 0; pass < Walk::kPasses; ++pass) {
    const int row = walk.row + pass * Walk::kRowsPerPass;
    if (row < rows_valid && walk.in_head_dim()) {
      *reinterpret_cast<uint4*>(matrix + row * row_stride + walk.chunk * kChunkColumns) =
          *reinterpret_cast<const uint4*>(tile + Tile::offset(row, walk.chunk));
    }
  }
}

}  // namespace jfa::tile
