// An accumulator to global memory, without a stop in shared memory.
#pragma once

#include <ptx/special_register.cuh>
#include <tile/fragment.cuh>

namespace jfa::tile {

// Rounds the 16 rows of an accumulator to 16 bits and writes those that exist: rows [0, rows) of a
// row-major matrix of kColumns columns. Neighbouring lanes exchange halves of two column tiles, so
// that four of them write the 32 bytes of a memory sector.
// Threads: a whole warp. Needs: rows that start on 8 bytes.
template <class Element, int kColumns, class Acc>
__device__ __forceinline__ void write_rows(unsigned short* matrix, int row_stride, int rows,
                                           const Acc& acc) {
  static_assert(Acc::kRowTiles == 1, "16 rows");
  const int lane = ptx::reread_lane();
  const bool odd = lane % 2 == 1;  // writes of the right column tile
  const int column = 8 * (lane % 2) + 4 * (lane % 4 / 2);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    unsigned short* const target = matrix + (static_cast<long long>(row) * row_stride + column);
#pragma unroll
    for (int n = 0; n < Acc::kColumnPairs; ++n) {
      const auto& left = acc.values[0][2 * n];
      const auto& right = acc.values[0][2 * n + 1];
      const unsigned left_word = Element::pack(left[2 * half], left[2 * half + 1]);
      const unsigned right_word = Element::pack(right[2 * half], right[2 * half + 1]);
      const unsigned received = __shfl_xor_sync(0xffffffffu, odd ? left_word : right_word, 1);
      const uint2 words = odd ? make_uint2(received, right_word) : make_uint2(left_word, received);
      if (row < rows && ((n + 1) * 16 <= kColumns || !odd))
        *reinterpret_cast<uint2*>(target + n * 16) = words;
    }
  }
}

}  // namespace jfa::tile
