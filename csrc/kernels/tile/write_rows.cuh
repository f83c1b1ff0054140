// An accumulator to global memory, without a stop in shared memory.
#pragma once

#include <ptx/special_register.cuh>
#include <tile/fragment.cuh>

namespace jfa::tile {

// What a lane writes of 16 rows of accumulators, rounded to 16 bits: of those that exist, which are
// rows [0, rows) of a row-major matrix. Neighbouring lanes exchange halves of two column tiles, so
// that four of them write the 32 bytes of a memory sector.
// Needs: rows that start on 8 bytes.
template <class Element>
struct RowWriter {
  unsigned short* rows_of_half[2];  // where this lane's columns start
  bool exists[2];
  bool odd;  // writes of the right column tile

  __device__ __forceinline__ RowWriter(unsigned short* matrix, int row_stride, int rows) {
    const int lane = ptx::reread_lane();
    odd = lane % 2 == 1;
    const int column = 8 * (lane % 2) + 4 * (lane % 4 / 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      rows_of_half[half] = matrix + (static_cast<long long>(row) * row_stride + column);
      exists[half] = row < rows;
    }
  }

  // Two column tiles side by side, or the left one alone. Threads: a whole warp.
  __device__ __forceinline__ void write(const float (&left)[4], const float (&right)[4],
                                        int first_column, bool both) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned left_word = Element::pack(left[2 * half], left[2 * half + 1]);
      const unsigned right_word = Element::pack(right[2 * half], right[2 * half + 1]);
      const unsigned received = __shfl_xor_sync(0xffffffffu, odd ? left_word : right_word, 1);
      const uint2 words = odd ? make_uint2(received, right_word) : make_uint2(left_word, received);
      if (exists[half] && (both || !odd))
        *reinterpret_cast<uint2*>(rows_of_half[half] + first_column) = words;
    }
  }
};

// The 16 rows of an accumulator, to a matrix of kColumns columns (RowWriter).
// Threads: a whole warp.
template <class Element, int kColumns, class Acc>
__device__ __forceinline__ void write_rows(unsigned short* matrix, int row_stride, int rows,
                                           const Acc& acc) {
  static_assert(Acc::kRowTiles == 1, "16 rows");
  const RowWriter<Element> writer(matrix, row_stride, rows);
#pragma unroll
  for (int n = 0; n < Acc::kColumnPairs; ++n)
    writer.write(acc.values[0][2 * n], acc.values[0][2 * n + 1], n * 16, (n + 1) * 16 <= kColumns);
}

}  // namespace jfa::tile
