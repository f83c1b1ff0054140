// How wgmma finds the elements of a SharedTile: matrix descriptors (PTX ISA 9.7.15.5.1), and the
// products of whole tiles.
//
// All tiles have the swizzle of 128-byte rows, eight rows to an atom of 1024 bytes, and start on a
// multiple of 1024 bytes, so that of a descriptor only the start address changes from step to step,
// by a constant.
#pragma once

#include <ptx/warpgroup.cuh>
#include <ptx/wgmma.cuh>
#include <tile/fragment.cuh>
#include <tile/shared_tile.cuh>

namespace jfa::tile {

// Upper word: 128-byte swizzle, and 1024 bytes from one group of eight rows to the next.
constexpr unsigned kDescriptorHigh = (1u << 30) | (1024 >> 4);

// A SharedTile as an operand whose rows run along M or N, and whose columns are summed over.
template <class Tile>
struct RowDescriptor {
  static constexpr bool kRowsSummed = false;
  unsigned low;

  // first_row: a multiple of 8.
  __device__ __forceinline__ RowDescriptor(unsigned tile, int first_row)
      : low(((tile + first_row * kPanelRowBytes) >> 4) | (1u << 16)) {}

  // That of the tile `offset` bytes further, see kUniform. Threads: a whole warp.
  __device__ __forceinline__ RowDescriptor uniform(unsigned offset) const {
    RowDescriptor further = *this;
    further.low = ptx::uniform(low + (offset >> 4));
    return further;
  }

  // Columns 16 * step to 16 * step + 15 of the tile `offset` bytes further.
  __device__ __forceinline__ unsigned long long at(unsigned offset, int step) const {
    const unsigned step_bytes = step / 4 * Tile::kPanelBytes + step % 4 * 32;
    return (static_cast<unsigned long long>(kDescriptorHigh) << 32) |
           (low + ((offset + step_bytes) >> 4));
  }
};

// A SharedTile as an operand whose rows are summed over, and whose columns run along M or N.
template <class Tile>
struct ColumnDescriptor {
  static constexpr bool kRowsSummed = true;
  unsigned low;

  __device__ __forceinline__ explicit ColumnDescriptor(unsigned tile)
      : low((tile >> 4) | ((Tile::kPanelBytes >> 4) << 16)) {}

  // That of the tile `offset` bytes further, see kUniform. Threads: a whole warp.
  __device__ __forceinline__ ColumnDescriptor uniform(unsigned offset) const {
    ColumnDescriptor further = *this;
    further.low = ptx::uniform(low + (offset >> 4));
    return further;
  }

  // Rows 16 * step to 16 * step + 15 of the tile `offset` bytes further.
  __device__ __forceinline__ unsigned long long at(unsigned offset, int step) const {
    return (static_cast<unsigned long long>(kDescriptorHigh) << 32) |
           (low + ((offset + step * 16 * kPanelRowBytes) >> 4));
  }
};

// Starts acc = A * B, or acc += A * B where `onto`, over 16 * kSteps elements of what is summed, as
// one batch. The rows of A run along M; B is a RowDescriptor, whose rows run along N, or a
// ColumnDescriptor, whose columns do.
// kFresh: with registers of its own for acc, which need not be those that acc had before. Where a
// loop around has no registers to spare for both, or for moves between them, one or the other form
// may not fit.
// kUniform: one lane says where the operands lie. Where ptxas can't prove that all lanes agree, it
// moves the descriptors of each step to uniform registers by themselves, up to four moves a step.
// Threads: a whole warpgroup, warp-uniform arguments.
template <class Element, int kSteps, bool kFresh = false, bool kUniform = false, class Acc,
          class TileA, class DescriptorB>
__device__ __forceinline__ void start_shared_product(Acc& acc, const RowDescriptor<TileA>& a,
                                                     unsigned a_offset, const DescriptorB& b,
                                                     unsigned b_offset, bool onto = false) {
  if constexpr (kUniform)
    return start_shared_product<Element, kSteps, kFresh>(acc, a.uniform(a_offset), 0,
                                                         b.uniform(b_offset), 0, onto);
  static_assert(Acc::kRowTiles == 1, "a warp of a warpgroup holds one 16-row block");
  using Product = ptx::Wgmma<Element, Acc::kColumnTiles * 8>;
  ptx::wgmma_fence();
  if constexpr (kFresh)
    Product::template overwrite<DescriptorB::kRowsSummed>(acc.values[0], a.at(a_offset, 0),
                                                          b.at(b_offset, 0));
#pragma unroll
  for (int step = kFresh; step < kSteps; ++step)
    Product::template multiply<DescriptorB::kRowsSummed>(acc.values[0], a.at(a_offset, step),
                                                         b.at(b_offset, step), step > 0 || onto);
  ptx::wgmma_commit();
}

// Starts acc = A * B over kSteps steps of 16, as one batch; registers hold A's first steps, which
// saves their reads, and shared memory the others. Threads: a whole warpgroup, warp-uniform
// arguments.
template <class Element, int kSteps, class Acc, int kHeldSteps, class TileA, class DescriptorB>
__device__ __forceinline__ void start_held_product(Acc& acc,
                                                   const RegisterOperand<1, kHeldSteps>& held,
                                                   const RowDescriptor<TileA>& a, unsigned a_offset,
                                                   const DescriptorB& b, unsigned b_offset) {
  static_assert(Acc::kRowTiles == 1, "a warp of a warpgroup holds one 16-row block");
  static_assert(kHeldSteps <= kSteps, "of A's steps");
  using Product = ptx::Wgmma<Element, Acc::kColumnTiles * 8>;
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kHeldSteps; ++step)
    Product::template multiply<DescriptorB::kRowsSummed>(acc.values[0], held.words[0][step],
                                                         b.at(b_offset, step), step > 0);
#pragma unroll
  for (int step = kHeldSteps; step < kSteps; ++step)
    Product::template multiply<DescriptorB::kRowsSummed>(acc.values[0], a.at(a_offset, step),
                                                         b.at(b_offset, step), true);
  ptx::wgmma_commit();
}

// Starts acc += A * B with A in registers, or acc = A * B unless `onto`, as one batch: over the
// first 16 * kSteps rows of B or, if that is a RowDescriptor, columns. kUniform: as above.
// Threads: a whole warpgroup, warp-uniform arguments.
template <class Element, bool kUniform = false, int kSteps, class Acc, class DescriptorB>
__device__ __forceinline__ void start_register_product(Acc& acc,
                                                       const RegisterOperand<1, kSteps>& a,
                                                       const DescriptorB& b, unsigned b_offset,
                                                       bool onto = true) {
  if constexpr (kUniform)
    return start_register_product<Element>(acc, a, b.uniform(b_offset), 0, onto);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    ptx::Wgmma<Element, Acc::kColumnTiles * 8>::template multiply<DescriptorB::kRowsSummed>(
        acc.values[0], a.words[0][step], b.at(b_offset, step), step > 0 || onto);
  ptx::wgmma_commit();
}

}  // namespace jfa::tile
