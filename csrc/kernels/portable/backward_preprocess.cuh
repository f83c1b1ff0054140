// First of the three kernels of a fused backward: the statistics of each query row
// (attention/row_statistics.cuh), and the zeros that the main kernel's dq sums (and marks and turn
// counters) start from.
//
// One CTA serves kPreprocessRows rows of one head; kThreadsPerRow threads share a row.
#pragma once

#include <attention/head_address.cuh>
#include <attention/row_statistics.cuh>
#include <params/backward_params.h>

namespace jfa::portable {

constexpr int kPreprocessThreads = 256;
constexpr int kPreprocessRows = kWorkspaceRowMultiple;

template <class Config>
struct PreprocessShapes {
  static constexpr int kChunks = Config::kHeadDim / 8;  // of 16 bytes
  static constexpr int kThreadsPerRow = kChunks > 16 ? 32 : kChunks > 8 ? 16 : 8;
  static constexpr int kRowsPerPass = kPreprocessThreads / kThreadsPerRow;
};

template <class Config>
__device__ __forceinline__ void backward_preprocess(const BackwardParams& params) {
  using Shapes = PreprocessShapes<Config>;
  const AttentionParams& attention = params.attention;
  const attention::GridPlace place(params.padded_rows / kPreprocessRows, attention.heads);
  const long long head = static_cast<long long>(place.batch) * attention.heads + place.head;
  const int first_row = place.tile * kPreprocessRows;

  const unsigned short* out = attention::head_address(params.out, place.batch, place.head);
  const unsigned short* dout = attention::head_address(params.dout, place.batch, place.head);

  // First, since nobody waits for stores: they are on their way while rows are read.
  const long long row_floats = params.padded_columns;
  float4* accum = reinterpret_cast<float4*>(params.dq_accum +
                                            (head * params.padded_rows + first_row) * row_floats);
  for (int i = threadIdx.x; i < kPreprocessRows * row_floats / 4; i += kPreprocessThreads)
    accum[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  const attention::RowStatistics statistics(params, place.batch, place.head);
  const int chunk = threadIdx.x % Shapes::kThreadsPerRow;
#pragma unroll 8
  for (int pass = 0; pass < kPreprocessRows / Shapes::kRowsPerPass; ++pass) {
    const int row = first_row + pass * Shapes::kRowsPerPass +
                    static_cast<int>(threadIdx.x) / Shapes::kThreadsPerRow;
    const attention::RowStatistics::Row known = statistics.load(row);
    const long long read_row = statistics.existing(row);
    const int read_chunk = min(chunk, Shapes::kChunks - 1);
    float sum = attention::dot_chunk<typename Config::Element>(
        out + read_row * params.out.row_stride + read_chunk * 8,
        dout + read_row * params.dout.row_stride + read_chunk * 8);
    if (chunk >= Shapes::kChunks) sum = 0.0f;
#pragma unroll
    for (int offset = Shapes::kThreadsPerRow / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (chunk == 0) statistics.store(row, known.lse_log2(), known.delta(sum));
  }

  if (place.tile == 0 && threadIdx.x == 0) params.spoilt[head] = 0;
  if (params.turns != nullptr) {
    constexpr int kTurns = kPreprocessRows / kSmallestQueryTile;
    const long long turns_per_head = params.padded_rows / kSmallestQueryTile;
    if (threadIdx.x < kTurns)
      params.turns[head * turns_per_head + place.tile * kTurns + threadIdx.x] = 0;
  }
}

}  // namespace jfa::portable
