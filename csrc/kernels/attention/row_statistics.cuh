// What the backward knows of a query row beforehand: with lse from the forward,
//   lse_log2 = lse * log2(e)      delta = rowsum(dout * out) - dlse
//
// A row that sees no key, or that does not exist, gets lse_log2 = +inf and delta = 0: its
// probabilities 2^(score - inf) are then 0 without a mask.
#pragma once

#include <attention/head_address.cuh>
#include <params/backward_params.h>
#include <ptx/cache_policy.cuh>
#include <ptx/constant_load.cuh>
#include <ptx/element.cuh>
#include <ptx/math.cuh>

namespace jfa::attention {

// 8 neighbouring elements of a row.
struct RowChunk {
  unsigned words[4];
};

// The rows of a matrix that nobody writes while the kernel runs.
struct RowReader {
  const unsigned short* matrix;
  int row_stride;
  unsigned long long cache_policy;

  __device__ __forceinline__ RowReader(const TensorView& view, int batch, int head,
                                       unsigned long long policy)
      : matrix(head_address(view, batch, head)),
        row_stride(view.row_stride),
        cache_policy(policy) {}

  __device__ __forceinline__ RowChunk load(int row, int chunk) const {
    RowChunk found;
    ptx::load_constant_words(
        found.words, matrix + static_cast<long long>(row) * row_stride + chunk * 8, cache_policy);
    return found;
  }
};

template <class Element>
__device__ __forceinline__ float dot(const RowChunk& a, const RowChunk& b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(Element::low(a.words[i]), Element::low(b.words[i]), sum);
    sum = fmaf(Element::high(a.words[i]), Element::high(b.words[i]), sum);
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

  // Nobody reads out again; the products read dout.
  __device__ __forceinline__ RowReader out() const {
    return {params.out, batch, head, ptx::kEvictFirst};
  }
  __device__ __forceinline__ RowReader dout() const {
    return {params.dout, batch, head, ptx::kEvictLast};
  }

  // The row to read in place of one that may not exist.
  __device__ __forceinline__ int existing(int row) const {
    return min(row, params.attention.seqlen_q - 1);
  }

  __device__ __forceinline__ Row load(int row) const {
    return read(row, [](const float* address) { return *address; });
  }

  // In front of what is read behind it, where the compiler would put it off and save registers.
  __device__ __forceinline__ Row load_ahead(int row) const {
    return read(row, [](const float* address) { return ptx::load_constant(address); });
  }

  __device__ __forceinline__ void store(int row, float lse_log2, float delta) const {
    const long long target = workspace_row(params, batch, head, row);
    params.lse_log2[target] = lse_log2;
    params.delta[target] = delta;
  }

 private:
  template <class ReadFloat>
  __device__ __forceinline__ Row read(int row, ReadFloat read_float) const {
    const float found = read_float(lse + existing(row));
    const float cotangent = dlse == nullptr ? 0.0f : read_float(dlse + existing(row));
    return {row < params.attention.seqlen_q ? found : -ptx::infinity(), cotangent};
  }
};

}  // namespace jfa::attention
