// Accumulators of m16n8k16 products in registers, and products of shared tiles into them.
//
// In a 16x8 accumulator, lane l holds (row l/4, columns 2*(l%4), +1) in elements 0 and 1, and
// (row l/4 + 8, the same columns) in elements 2 and 3. Two neighbours side by side, packed to 16
// bits, are the A operand of the next product with no data movement.
#pragma once

#include <ptx/ldmatrix.cuh>
#include <ptx/special_register.cuh>
#include <ptx/stmatrix.cuh>
#include <tile/shared_tile.cuh>

namespace jfa::tile {

// A warp's share of a product: kRowTiles x kColumnPairs blocks of 16x16.
template <int kRowTileCount, int kColumnPairCount>
struct Accumulator {
  static constexpr int kRowTiles = kRowTileCount;
  static constexpr int kColumnPairs = kColumnPairCount;
  static constexpr int kColumnTiles = 2 * kColumnPairs;

  float values[kRowTiles][kColumnTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[m][n][i] = 0.0f;
  }

  __device__ __forceinline__ bool is_finite() const {
    float trace = 0.0f;  // becomes NaN: 0 times infinity is NaN, too
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) trace = fmaf(values[m][n][i], 0.0f, trace);
    return trace == 0.0f;
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[m][n][i] *= factor;
  }
};

// An A operand read from shared memory: rows of the tile are rows of A.
template <class Tile, int kRowStride>
struct RowOperand {
  LaneView<Tile, SubTileOrder::kRowsFirst> view;

  __device__ __forceinline__ void load(unsigned (&words)[4], int row_tile, int step) const {
    ptx::ldmatrix_x4(words, view.at(row_tile * kRowStride, step));
  }
};

// An A operand read from shared memory: columns of the tile are rows of A.
template <class Tile, int kColumn16Stride>
struct ColumnOperand {
  LaneView<Tile, SubTileOrder::kColumnsFirst> view;

  __device__ __forceinline__ void load(unsigned (&words)[4], int row_tile, int step) const {
    ptx::ldmatrix_x4_transposed(words, view.at(step * 16, row_tile * kColumn16Stride));
  }
};

// An A operand in registers, packed from an accumulator.
template <int kRowTiles, int kSteps>
struct RegisterOperand {
  unsigned words[kRowTiles][kSteps][4];

  template <class Element>
  __device__ __forceinline__ void pack(const Accumulator<kRowTiles, kSteps>& source) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        pack_step<Element>(m, k, source.values[m][2 * k], source.values[m][2 * k + 1]);
  }

  // Two column tiles of an accumulator, side by side, are one step.
  template <class Element>
  __device__ __forceinline__ void pack_step(int row_tile, int step, const float (&left)[4],
                                            const float (&right)[4]) {
    words[row_tile][step][0] = Element::pack(left[0], left[1]);
    words[row_tile][step][1] = Element::pack(left[2], left[3]);
    words[row_tile][step][2] = Element::pack(right[0], right[1]);
    words[row_tile][step][3] = Element::pack(right[2], right[3]);
  }

  // Rows of a shared tile, from a multiple of 16 on. Threads: a whole warp.
  template <class Tile>
  __device__ __forceinline__ void read_rows(unsigned tile, int first_row) {
    const LaneView<Tile, SubTileOrder::kRowsFirst> view(tile, 0, first_row);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int k = 0; k < kSteps; ++k) ptx::ldmatrix_x4(words[m][k], view.at(m * 16, k));
  }

  // 16 rows of a row-major matrix of kColumns columns, of those that exist, which are rows
  // [0, rows); zeros for the others. Threads: a whole warp. Needs: rows that start on 4 bytes.
  template <int kColumns>
  __device__ __forceinline__ void read_rows_of(const unsigned short* matrix, int row_stride,
                                               int rows) {
    static_assert(kRowTiles == 1, "16 rows");
    static_assert(kColumns % 8 == 0, "eight columns exist together");
    const int lane = ptx::reread_lane();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const unsigned short* const source =
          matrix + static_cast<long long>(row) * row_stride + 2 * (lane % 4);
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int column = k * 16 + side * 8;
          words[0][k][half + 2 * side] = column < kColumns && row < rows
                                             ? *reinterpret_cast<const unsigned*>(source + column)
                                             : 0;
        }
    }
  }

  __device__ __forceinline__ void load(unsigned (&out)[4], int row_tile, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = words[row_tile][step][i];
  }
};

// A B operand whose columns are rows of the tile (the tile holds B transposed).
template <class Tile, int kRowStride>
struct TransposedOperand {
  LaneView<Tile, SubTileOrder::kColumnsFirst> view;

  __device__ __forceinline__ void load(unsigned (&words)[4], int step, int column_pair) const {
    ptx::ldmatrix_x4(words, view.at(column_pair * kRowStride, step));
  }
};

// A B operand stored as it is: rows of the tile are rows of B.
template <class Tile, int kColumn16Stride>
struct StraightOperand {
  LaneView<Tile, SubTileOrder::kRowsFirst> view;

  __device__ __forceinline__ void load(unsigned (&words)[4], int step, int column_pair) const {
    ptx::ldmatrix_x4_transposed(words, view.at(step * 16, column_pair * kColumn16Stride));
  }
};

// acc += A * B over kSteps steps of 16. Unrolling fewer steps at a time keeps ptxas from loading
// operands so early that it spills.
// Threads: a whole warp.
template <class Element, int kSteps, int kUnroll = kSteps, class Acc, class OperandA,
          class OperandB>
__device__ __forceinline__ void multiply_accumulate(Acc& acc, const OperandA& a_operand,
                                                    const OperandB& b_operand) {
#pragma unroll(kUnroll)
  for (int k = 0; k < kSteps; ++k) {
    unsigned a[Acc::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Acc::kRowTiles; ++m) a_operand.load(a[m], m, k);
#pragma unroll
    for (int n = 0; n < Acc::kColumnPairs; ++n) {
      unsigned b[4];
      b_operand.load(b, k, n);
#pragma unroll
      for (int m = 0; m < Acc::kRowTiles; ++m) {
        Element::mma(acc.values[m][2 * n], a[m], b[0], b[1]);
        Element::mma(acc.values[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Rounds an accumulator to 16 bits into a shared tile. Row tile m starts at row
// first_row + m * kRowStride, column pair n at 16-block first_column16 + n * kColumn16Stride.
// Threads: a whole warp.
template <class Element, class Tile, int kRowStride, int kColumn16Stride, class Acc>
__device__ __forceinline__ void store_accumulator(unsigned origin, unsigned tile_offset,
                                                  const Acc& acc, int first_row,
                                                  int first_column16) {
  const LaneView<Tile, SubTileOrder::kRowsFirst> view(origin, tile_offset, first_row,
                                                      first_column16);
#pragma unroll
  for (int m = 0; m < Acc::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < Acc::kColumnPairs; ++n) {
      const auto& left = acc.values[m][2 * n];
      const auto& right = acc.values[m][2 * n + 1];
      const unsigned words[4] = {Element::pack(left[0], left[1]), Element::pack(left[2], left[3]),
                                 Element::pack(right[0], right[1]),
                                 Element::pack(right[2], right[3])};
      ptx::store_matrices(view.at(m * kRowStride, n * kColumn16Stride), words);
    }
}

#if __CUDA_ARCH__ >= 900
// Stores packed accumulators of one 16-row block transposed: rows of the tile are columns of the
// accumulator, from row 0 on, and its columns the block's rows, from `first_column16` on.
// Threads: a whole warp.
template <class Tile, int kSteps>
__device__ __forceinline__ void store_transposed(unsigned tile,
                                                 const RegisterOperand<1, kSteps>& source,
                                                 int first_column16) {
  const int lane = ptx::reread_lane();
  const int row = lane % 8 + lane / 16 * 8;
  const int chunk = 2 * first_column16 + lane / 8 % 2;
  const unsigned target = tile + Tile::offset(row, chunk);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    ptx::store_matrices_transposed(target + step * 16 * kPanelRowBytes, source.words[0][step]);
}
#endif

}  // namespace jfa::tile
