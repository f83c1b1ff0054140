// What a fused backward starts from: zeros for the sums of dq, and the statistics of the query rows
// (attention/row_statistics.cuh). Both for kWorkspaceRowMultiple rows of a head at a time, a block.
#pragma once

#include <attention/head_address.cuh>
#include <attention/row_statistics.cuh>
#include <params/backward_params.h>

namespace jfa::attention {

// Threads: kThreads, of which this is number `thread`.
template <int kThreads>
__device__ __forceinline__ void clear_sums(const BackwardParams& params, int batch, int head,
                                           int block, int thread) {
  const long long row_floats = params.padded_columns;
  float4* const sums = reinterpret_cast<float4*>(
      params.dq_accum +
      workspace_row(params, batch, head, block * kWorkspaceRowMultiple) * row_floats);
  for (int i = thread; i < kWorkspaceRowMultiple * row_floats / 4; i += kThreads)
    sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// How kThreads threads, whole warps, share rows of out and of dout, of kChunks times 16 bytes.
template <int kChunks, int kThreads>
struct RowDots {
  static constexpr int kThreadsPerRow = kChunks > 16 ? 32 : kChunks > 8 ? 16 : 8;
  static constexpr int kRowsPerPass = kThreads / kThreadsPerRow;

  // For a thread's chunk of two rows; those behind the last one read that again.
  static __device__ __forceinline__ int read_chunk(int thread) {
    return min(thread % kThreadsPerRow, kChunks - 1);
  }

  // The product of two rows, known to all their threads, from that of this thread's chunks.
  static __device__ __forceinline__ float join(float chunk_dot, int thread) {
    float sum = thread % kThreadsPerRow < kChunks ? chunk_dot : 0.0f;
#pragma unroll
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  }
};

}  // namespace jfa::attention
