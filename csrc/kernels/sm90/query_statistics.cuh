// What the warps beside the producer work out of query rows, for the kernels that leave it to them:
// lse in units of log2 and delta (attention/row_statistics.cuh).
#pragma once

#include <attention/head_address.cuh>
#include <attention/row_statistics.cuh>
#include <params/backward_params.h>

namespace jfa::sm90 {

constexpr int kStatisticsWarps = 3;  // all of the producer's warpgroup but the producer

// Rows [first_row, first_row + kTileRows) of a head, to the workspace. Warps take turns at a pass
// of rows; eight lanes share a row. keep(tile_row, lse_log2, delta) is told each, too.
// kChunksAhead: chunks of out and of dout that a lane has on their way, for which it has registers.
// Threads: a whole warp, of kStatisticsWarps.
template <class Config, int kTileRows, int kChunksAhead, class Keep>
__device__ __forceinline__ void make_statistics(const BackwardParams& backward, int batch, int head,
                                                int first_row, int warp, Keep keep) {
  constexpr int kRowLanes = 8;
  constexpr int kChunks = Config::kHeadDim / 8;
  constexpr int kSteps = (kChunks + kRowLanes - 1) / kRowLanes;
  // Rows of a lane in a pass.
  constexpr int kRows = kSteps < kChunksAhead ? kChunksAhead / kSteps : 1;
  constexpr int kPassRows = 32 / kRowLanes * kRows;
  const int lane = threadIdx.x % 32;
  const auto tile_row = [&](int pass, int i) {
    return (pass * kRows + i) * (32 / kRowLanes) + lane / kRowLanes;
  };
  const attention::RowStatistics statistics(backward, batch, head);
  const unsigned short* const out = attention::head_address(backward.out, batch, head);
  const unsigned short* const dout = attention::head_address(backward.dout, batch, head);
#pragma unroll 1
  for (int pass = warp; pass < kTileRows / kPassRows; pass += kStatisticsWarps) {
    attention::RowStatistics::Row known[kRows];
    float sums[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first_row + tile_row(pass, i);
      known[i] = statistics.load(row);
      const long long read_row = statistics.existing(row);
      sums[i] = 0.0f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int chunk = step * kRowLanes + lane % kRowLanes;
        const int read_chunk = min(chunk, kChunks - 1);
        const float sum = attention::dot_chunk<typename Config::Element>(
            out + read_row * backward.out.row_stride + read_chunk * 8,
            dout + read_row * backward.dout.row_stride + read_chunk * 8);
        if (chunk < kChunks) sums[i] += sum;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int offset = kRowLanes / 2; offset > 0; offset /= 2)
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
      if (lane % kRowLanes == 0) {
        const float lse_log2 = known[i].lse_log2();
        const float delta = known[i].delta(sums[i]);
        keep(tile_row(pass, i), lse_log2, delta);
        statistics.store(first_row + tile_row(pass, i), lse_log2, delta);
      }
    }
  }
}

}  // namespace jfa::sm90
