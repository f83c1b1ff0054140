// First of the three backward kernels: per query row
//   delta = rowsum(dout * out) - dlse      lse_log2 = lse * log2(e)
// and the zeros that the main kernel's dq sums (and marks and turn counters) start from.
//
// A padded row, and a row that sees no key, gets lse_log2 = +inf and delta = 0: its probabilities
// 2^(score - inf) are then 0 in the main kernel without a mask.
//
// One CTA serves kPreprocessRows rows of one head; kThreadsPerRow threads share a row.
#pragma once

#include <attention/head_address.cuh>
#include <params/backward_params.h>
#include <ptx/element.cuh>
#include <ptx/math.cuh>

namespace jfa::portable {

constexpr int kPreprocessThreads = 256;
constexpr int kPreprocessRows = kWorkspaceRowMultiple;

template <class Config>
struct PreprocessShapes {
  static constexpr int kChunks = Config::kHeadDim / 8;  // of 16 bytes
  static constexpr int kThreadsPerRow = kChunks > 16 ? 32 : kChunks > 8 ? 16 : 8;
  static constexpr int kRowsPerPass = kPreprocessThreads / kThreadsPerRow;
};

template <class Element>
__device__ __forceinline__ float dot_chunk(const unsigned short* a, const unsigned short* b) {
  const uint4 a_words = *reinterpret_cast<const uint4*>(a);
  const uint4 b_words = *reinterpret_cast<const uint4*>(b);
  const unsigned a_word[4] = {a_words.x, a_words.y, a_words.z, a_words.w};
  const unsigned b_word[4] = {b_words.x, b_words.y, b_words.z, b_words.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(Element::low(a_word[i]), Element::low(b_word[i]), sum);
    sum = fmaf(Element::high(a_word[i]), Element::high(b_word[i]), sum);
  }
  return sum;
}

template <class Config>
__device__ __forceinline__ void backward_preprocess(const BackwardParams& params) {
  using Shapes = PreprocessShapes<Config>;
  const AttentionParams& attention = params.attention;
  const attention::GridPlace place(params.padded_rows / kPreprocessRows, attention.heads);
  const long long head = static_cast<long long>(place.batch) * attention.heads + place.head;
  const int first_row = place.tile * kPreprocessRows;

  const unsigned short* out = attention::head_address(params.out, place.batch, place.head);
  const unsigned short* dout = attention::head_address(params.dout, place.batch, place.head);
  const auto statistics = [&](const float* values, int batches) {
    return values +
           (static_cast<long long>(attention::own_batch(place.batch, batches)) * attention.heads +
            place.head) *
               attention.seqlen_q;
  };
  const float* lse = statistics(params.lse, params.lse_batches);

  // First, since nobody waits for stores: they are on their way while rows are read.
  const long long row_floats = params.padded_columns;
  float4* accum = reinterpret_cast<float4*>(params.dq_accum +
                                            (head * params.padded_rows + first_row) * row_floats);
  for (int i = threadIdx.x; i < kPreprocessRows * row_floats / 4; i += kPreprocessThreads)
    accum[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  const int chunk = threadIdx.x % Shapes::kThreadsPerRow;
#pragma unroll 8
  for (int pass = 0; pass < kPreprocessRows / Shapes::kRowsPerPass; ++pass) {
    const int row = first_row + pass * Shapes::kRowsPerPass +
                    static_cast<int>(threadIdx.x) / Shapes::kThreadsPerRow;
    const bool exists = row < attention.seqlen_q;
    float sum = 0.0f;
    if (exists && chunk < Shapes::kChunks) {
      sum = dot_chunk<typename Config::Element>(
          out + static_cast<long long>(row) * params.out.row_stride + chunk * 8,
          dout + static_cast<long long>(row) * params.dout.row_stride + chunk * 8);
    }
#pragma unroll
    for (int offset = Shapes::kThreadsPerRow / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (chunk == 0) {
      const float row_lse = exists ? lse[row] : -ptx::infinity();
      const bool empty = row_lse == -ptx::infinity();
      if (exists && params.dlse != nullptr)
        sum -= statistics(params.dlse, params.dlse_batches)[row];
      params.lse_log2[head * params.padded_rows + row] =
          empty ? ptx::infinity() : row_lse * ptx::kLog2E;
      params.delta[head * params.padded_rows + row] = empty ? 0.0f : sum;
    }
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
