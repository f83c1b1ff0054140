// First of the three kernels of a fused backward: what the main kernel starts from
// (attention/row_preparation.cuh), for all heads or for the first ones, and zeros for the marks,
// counters and turns of all.
//
// One CTA serves kPreprocessRows rows of one head.
#pragma once

#include <attention/head_address.cuh>
#include <attention/row_preparation.cuh>
#include <params/backward_params.h>
#include <ptx/grid_dependency.cuh>

namespace jfa::portable {

constexpr int kPreprocessThreads = 256;
constexpr int kPreprocessRows = kWorkspaceRowMultiple;

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
  attention::clear_sums<kPreprocessThreads>(params, place.batch, place.head, place.tile,
                                            threadIdx.x);
  using Dots = attention::RowDots<Config::kHeadDim / 8, kPreprocessThreads>;
  const attention::RowStatistics statistics(params, place.batch, place.head);
  const int chunk = Dots::read_chunk(threadIdx.x);
  const unsigned short* out = attention::head_address(params.out, place.batch, place.head);
  const unsigned short* dout = attention::head_address(params.dout, place.batch, place.head);
#pragma unroll 8
  for (int pass = 0; pass < kPreprocessRows / Dots::kRowsPerPass; ++pass) {
    const int row = place.tile * kPreprocessRows + pass * Dots::kRowsPerPass +
                    static_cast<int>(threadIdx.x) / Dots::kThreadsPerRow;
    const attention::RowStatistics::Row known = statistics.load(row);
    const long long read_row = statistics.existing(row);
    const float dot = attention::dot_chunk<typename Config::Element>(
        out + read_row * params.out.row_stride + chunk * 8,
        dout + read_row * params.dout.row_stride + chunk * 8);
    const float sum = Dots::join(dot, threadIdx.x);
    if (threadIdx.x % Dots::kThreadsPerRow == 0)
      statistics.store(row, known.lse_log2(), known.delta(sum));
  }
}

}  // namespace jfa::portable
