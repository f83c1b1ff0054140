// What the warps beside the producer work out of query rows, for the kernels that leave it to them:
// lse in units of log2 and delta (attention/row_statistics.cuh).
#pragma once

#include <attention/row_statistics.cuh>
#include <params/backward_params.h>
#include <ptx/atomic.cuh>
#include <ptx/grid_dependency.cuh>
#include <ptx/special_register.cuh>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <tile/ring.cuh>

namespace jfa::sm90 {

constexpr int kStatisticsWarps = 3;  // all of the producer's warpgroup but the producer

// Rows [first_row, first_row + kTileRows) of a head, to the workspace. Warps take turns at a pass
// of rows. keep(tile_row, lse_log2, delta) is told each, too.
// kChunksAhead: chunks of out and of dout that a lane has on their way, for which it has registers.
// Threads: a whole warp, of kStatisticsWarps.
template <class Config, int kTileRows, int kChunksAhead, class Keep>
__device__ __forceinline__ void make_statistics(const BackwardParams& backward, int batch, int head,
                                                int first_row, int warp, Keep keep) {
  constexpr int kChunks = Config::kHeadDim / 8;
  // That share a row: the fewer, the fewer sums to join. Four read two sectors side by side.
  constexpr int kRowLanes = kChunks > 4 * kChunksAhead ? 8 : 4;
  constexpr int kSteps = (kChunks + kRowLanes - 1) / kRowLanes;
  static_assert(kSteps <= kChunksAhead, "a lane has its whole row on the way");
  constexpr int kRows = kChunksAhead / kSteps;  // of a lane in a pass
  constexpr int kLaneRows = 32 / kRowLanes;
  constexpr int kPassRows = kLaneRows * kRows;
  static_assert(kTileRows % kPassRows == 0, "whole passes");
  const int lane = threadIdx.x % 32;
  const int lane_chunk = lane % kRowLanes;
  const attention::RowStatistics statistics(backward, batch, head);
  const attention::RowReader out = statistics.out();
  const attention::RowReader dout = statistics.dout();
#pragma unroll 1
  for (int pass = warp; pass < kTileRows / kPassRows; pass += kStatisticsWarps) {
    const auto tile_row = [&](int i) {
      return pass * kPassRows + i * kLaneRows + lane / kRowLanes;
    };
    // All of a pass is on its way before any of it is waited for.
    attention::RowChunk out_chunks[kRows][kSteps];
    attention::RowChunk dout_chunks[kRows][kSteps];
    attention::RowStatistics::Row known[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = statistics.existing(first_row + tile_row(i));
      known[i] = statistics.load_ahead(first_row + tile_row(i));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int chunk = min(step * kRowLanes + lane_chunk, kChunks - 1);
        out_chunks[i][step] = out.load(row, chunk);
        dout_chunks[i][step] = dout.load(row, chunk);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const float dot =
            attention::dot<typename Config::Element>(out_chunks[i][step], dout_chunks[i][step]);
        if ((step + 1) * kRowLanes <= kChunks || step * kRowLanes + lane_chunk < kChunks)
          sum += dot;
      }
#pragma unroll
      for (int offset = kRowLanes / 2; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane_chunk == 0) {
        const float lse_log2 = known[i].lse_log2();
        const float delta = known[i].delta(sum);
        keep(tile_row(i), lse_log2, delta);
        statistics.store(first_row + tile_row(i), lse_log2, delta);
      }
    }
  }
}

// Lets the kernel of dk and dv start: a CTA of it takes a multiprocessor when the CTA of dq there
// has ended, though others go on. Threads: all of a CTA of dq, at its start, before a CTA barrier.
__device__ __forceinline__ void start_key_gradient(const Sm90DealtBackwardParams& params) {
  // Cleared before the next kernel starts, by the CTA that adds to it.
  if (params.statistics_done != nullptr) {
    if (threadIdx.x != 0) return;
    ptx::store_release(params.statistics_done + ptx::reread_cta(), 0);
    __threadfence();
  }
  ptx::start_next_grid();
}

// Tells that a warp has worked out all its statistics of its CTA. Threads: the warp.
__device__ __forceinline__ void tell_statistics(const Sm90DealtBackwardParams& params) {
  if (params.statistics_done == nullptr) return;
  ptx::fence_async_proxy_global();  // the copy engine reads what threads have written
  __syncwarp();
  if (ptx::elect_lane()) ptx::add_release(params.statistics_done + ptx::reread_cta(), 1);
}

// By which a warp of the kernel of dk and dv lets its producer go on, which has no registers to
// wait for many CTAs itself.
struct StatisticsGate {
  using Ring = tile::Ring<1>;
  using Position = tile::RingPosition<1>;
  static constexpr int kWarp = 3;  // beside the producer's
  Ring ring;

  // Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init() const { ring.init(/*users=*/1, /*fillers=*/32); }

  // Waits for the statistics of all query rows. Threads: warp kWarp.
  __device__ __forceinline__ void open(const Sm90DealtBackwardParams& params) const {
    if (params.statistics_done == nullptr) {
      ptx::await_previous_grid();
    } else {
#pragma unroll 1
      for (int cta = ptx::reread_lane(); cta < params.statistics_ctas; cta += 32)
        ptx::await_flag(params.statistics_done + cta, kStatisticsWarps);
    }
    ptx::fence_async_proxy_global();  // the copy engine reads what threads have written
    ring.finish_fill(Position{0});
    // Who comes behind this kernel may read dq.
    ptx::await_previous_grid();
  }

  // Threads: the producer.
  __device__ __forceinline__ void await() const { ring.wait_full(Position{0}); }
};

}  // namespace jfa::sm90
