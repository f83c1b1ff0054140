// A matrix of 16-bit elements in shared memory, stored as panels 64 elements (128 bytes) wide.
// The 16-byte chunk c of a panel's row r lies at chunk c ^ (r % 8), so that eight rows of one
// chunk fall into eight different bank groups: ldmatrix and its transposed form, and the stores of
// accumulator fragments, are free of bank conflicts.
#pragma once

namespace jfa::tile {

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kChunkColumns = 8;  // 16 bytes

template <int kRowCount, int kColumnCount>
struct SharedTile {
  static constexpr int kRows = kRowCount;
  static constexpr int kPanels = (kColumnCount + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kColumns = kPanels * kPanelColumns;
  static constexpr int kPanelBytes = kRows * kPanelRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kRows % 8 == 0, "a swizzle atom has eight rows");

  // Byte offset of a 16-byte chunk from the tile's start.
  static __device__ __forceinline__ unsigned offset(int row, int chunk) {
    return (chunk / 8) * kPanelBytes + row * kPanelRowBytes + (((chunk % 8) ^ (row % 8)) * 16);
  }
};

// How the four 8x8 matrices of one ldmatrix.x4 cover a 16x16 sub-tile.
enum class SubTileOrder {
  kRowsFirst,     // (rows 0-7, columns 0-7), (rows 8-15, columns 0-7), then columns 8-15
  kColumnsFirst,  // (rows 0-7, columns 0-7), (rows 0-7, columns 8-15), then rows 8-15
};

// A lane's view of a SharedTile for ldmatrix. What depends on the lane is kept apart from the
// tile's offset, which is a constant, so that views of several tiles with the same origin, first
// row and first column share registers: the address of a sub-tile costs at most one XOR and one
// addition, both shared, and an immediate. The first column's 16-block must be smaller than the
// stride with which the caller walks columns (see at()), a power of two up to 4, for XOR to act as
// addition.
template <class Tile, SubTileOrder kOrder>
struct LaneView {
  unsigned origin;  // the tile starts tile_offset bytes behind it
  unsigned tile_offset;
  unsigned lane_offset;

  __device__ __forceinline__ LaneView(unsigned origin_address, unsigned offset, int first_row,
                                      int first_column16 = 0)
      : origin(origin_address), tile_offset(offset) {
    const int lane = threadIdx.x % 32;
    const int row = kOrder == SubTileOrder::kRowsFirst ? lane % 16 : lane % 8 + lane / 16 * 8;
    const int chunk = kOrder == SubTileOrder::kRowsFirst ? lane / 16 : lane / 8 % 2;
    // First rows are multiples of 8 and first columns lie in the first panel.
    lane_offset =
        (first_row + row) * kPanelRowBytes + (((chunk + 2 * first_column16) ^ (row % 8)) * 16);
  }

  // Address for the sub-tile `row` rows (a multiple of 8) and `column16` 16-column blocks away.
  __device__ __forceinline__ unsigned at(int row, int column16) const {
    return (origin + (lane_offset ^ ((column16 % 4) * 32))) +
           (tile_offset + (column16 / 4) * Tile::kPanelBytes + row * kPanelRowBytes);
  }
};

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

}  // namespace jfa::tile
