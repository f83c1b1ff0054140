// What the backward knows of a query row beforehand: with lse from the forward,
//   lse_log2 = lse * log2(e)      delta = rowsum(dout * out) - dlse
//
// A row that sees no key, or that does not exist, gets lse_log2 = +inf and delta = 0: its
// probabilities 2^(score - inf) are then 0 without a mask.
#pragma once

#include <attention/head_address.cuh>
#include <params/backward_params.h>
#include <ptx/element.cuh>
#include <ptx/math.cuh>

namespace jfa::attention {

// The product of 8 neighbouring elements of two rows.
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

// Of the rows of a head. No read stands behind a branch: a branch waits for what it has read, and
// many reads should be on their way.
struct RowStatistics {
  const BackwardParams& params;
  const float* lse;
  const float* dlse;  // or null
  int batch;
  int head;

  // Of one row, in natural units.
  struct Row {
    float lse;
    float dlse;

    __device__ __forceinline__ bool empty() const { return lse == -ptx::infinity(); }
    __device__ __forceinline__ float lse_log2() const {
      return empty() ? ptx::infinity() : lse * ptx::kLog2E;
    }
    // out_dot_dout: anything where the row does not exist.
    __device__ __forceinline__ float delta(float out_dot_dout) const {
      return empty() ? 0.0f : out_dot_dout - dlse;
    }
  };

  __device__ __forceinline__ RowStatistics(const BackwardParams& backward, int batch_of_rows,
                                           int head_of_rows)
      : params(backward), batch(batch_of_rows), head(head_of_rows) {
    const AttentionParams& attention = params.attention;
    const auto first_row = [&](const float* values, int batches) {
      return values + (static_cast<long long>(own_batch(batch, batches)) * attention.heads + head) *
                          attention.seqlen_q;
    };
    lse = first_row(params.lse, params.lse_batches);
    dlse = params.dlse == nullptr ? nullptr : first_row(params.dlse, params.dlse_batches);
  }

  // The row to read in place of one that may not exist.
  __device__ __forceinline__ int existing(int row) const {
    return min(row, params.attention.seqlen_q - 1);
  }

  __device__ __forceinline__ Row load(int row) const {
    const float found = lse[existing(row)];
    const float cotangent = dlse == nullptr ? 0.0f : dlse[existing(row)];
    return {row < params.attention.seqlen_q ? found : -ptx::infinity(), cotangent};
  }

  __device__ __forceinline__ void store(int row, float lse_log2, float delta) const {
    const long long target = workspace_row(params, batch, head, row);
    params.lse_log2[target] = lse_log2;
    params.delta[target] = delta;
  }
};

}  // namespace jfa::attention
