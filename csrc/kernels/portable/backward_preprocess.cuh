// First of the three kernels of a backward that sums dq in memory. It leaves what the main kernel
// starts from, zeros for the sums of dq and the statistics of the query rows
// (attention/row_statistics.cuh), for all heads or for the first ones, and zeros for the marks,
// counters and turns of all.
//
// One CTA serves kPreprocessRows rows of one head.
#pragma once

#include <attention/head_address.cuh>
#include <attention/row_statistics.cuh>
#include <params/backward_params.h>
#include <ptx/grid_dependency.cuh>

namespace jfa::portable {

constexpr int kPreprocessThreads = 256;
constexpr int kPreprocessRows = kWorkspaceRowMultiple;

// How the threads share rows of out and of dout, of kChunks times 16 bytes.
template <int kChunks>
struct RowDots {
  static constexpr int kThreadsPerRow = kChunks > 16 ? 32 : kChunks > 8 ? 16 : 8;
  static constexpr int kRowsPerPass = kPreprocessThreads / kThreadsPerRow;

  // For a thread's chunk of two rows; those behind the last one read that again.
  static __device__ __forceinline__ int read_chunk() {
    return min(static_cast<int>(threadIdx.x) % kThreadsPerRow, kChunks - 1);
  }

  // The product of two rows, known to all their threads, from that of this thread's chunks.
  static __device__ __forceinline__ float join(float chunk_dot) {
    float sum = threadIdx.x % kThreadsPerRow < kChunks ? chunk_dot : 0.0f;
#pragma unroll
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  }
};

template <class Config>
__device__ __forceinline__ void backward_preprocess(const BackwardParams& params) {
  ptx::start_next_grid();
  const AttentionParams& attention = params.attention;
  const attention::GridPlace place(params.padded_rows / kPreprocessRows, attention.heads);

  const int states = kHeadStates * attention.batch * attention.heads;
  for (unsigned i = blockIdx.x * kPreprocessThreads + threadIdx.x; i < states;
       i += gridDim.x * kPreprocessThreads)
    params.spoilt[i] = 0;
  if (params.turns != nullptr) {
    constexpr int kTurns = kPreprocessRows / kSmallestQueryTile;
    const long long first =
        attention::workspace_row(params, place.batch, place.head, place.tile * kPreprocessRows) /
        kSmallestQueryTile;
    if (threadIdx.x < kTurns) params.turns[first + threadIdx.x] = 0;
  }

  // First, since nobody waits for stores: they are on their way while rows are read.
  const long long row_floats = params.padded_columns;
  float4* const sums = reinterpret_cast<float4*>(
      params.dq_accum +
      attention::workspace_row(params, place.batch, place.head, place.tile * kPreprocessRows) *
          row_floats);
  for (int i = threadIdx.x; i < kPreprocessRows * row_floats / 4; i += kPreprocessThreads)
    sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  using Dots = RowDots<Config::kHeadDim / 8>;
  const attention::RowStatistics statistics(params, place.batch, place.head);
  const int chunk = Dots::read_chunk();
  const attention::RowReader out = statistics.out();
  const attention::RowReader dout = statistics.dout();
#pragma unroll 8
  for (int pass = 0; pass < kPreprocessRows / Dots::kRowsPerPass; ++pass) {
    const int row = place.tile * kPreprocessRows + pass * Dots::kRowsPerPass +
                    static_cast<int>(threadIdx.x) / Dots::kThreadsPerRow;
    const attention::RowStatistics::Row known = statistics.load_ahead(row);
    const int read_row = statistics.existing(row);
    const float dot = attention::dot<typename Config::Element>(out.load(read_row, chunk),
                                                               dout.load(read_row, chunk));
    const float sum = Dots::join(dot);
    if (threadIdx.x % Dots::kThreadsPerRow == 0)
      statistics.store(row, known.lse_log2(), known.delta(sum));
  }
}

}  // namespace jfa::portable
