// Softmax over keys that arrive tile by tile (Milakov and Gimelshein 2018; FlashAttention, Dao et
// al. 2022, algorithm 1), for the rows that one thread holds in a score accumulator.
//
// Row sums stay partial, one for each of the four threads that share a row, until finish().
#pragma once

#include <ptx/math.cuh>

namespace jfa::attention {

// The reference that exponents are taken against may lag behind the true row maximum by this many
// powers of two before the output is rescaled: probabilities then stay below 2^8, far from the
// limits of fp16, bf16 and of fp32 sums, and almost every tile after the first few skips the
// rescaling. The result is exact with respect to whichever reference was used (FlashAttention-4).
constexpr float kLazyRescaleLog2 = 8.0f;

template <int kRowTiles>
struct OnlineSoftmax {
  float reference[kRowTiles][2];  // in score units; -inf until a key is seen
  float sum[kRowTiles][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        reference[m][half] = -ptx::infinity();
        sum[m][half] = 0.0f;
      }
  }

  // Turns scores into probabilities relative to the reference and rescales `out` when it moves.
  template <class Scores, class Out>
  __device__ __forceinline__ void update(Scores& scores, Out& out, float exponent_scale) {
    float row_max[kRowTiles][2];
    bool moves = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] = row_maximum(scores, m, half);
        moves |= (row_max[m][half] - reference[m][half]) * exponent_scale > kLazyRescaleLog2;
      }
    // -inf minus -inf is NaN and compares false: a row without keys so far does not move.
    if (__any_sync(0xffffffffu, moves)) rescale(row_max, out, exponent_scale);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) exponentiate(scores, m, half, exponent_scale);
  }

  // Completes the row sums and returns lse in natural log units.
  __device__ __forceinline__ void finish(float (&lse)[kRowTiles][2], float exponent_scale) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& total = sum[m][half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        lse[m][half] = total == 0.0f
                           ? -ptx::infinity()
                           : (reference[m][half] * exponent_scale * ptx::kLn2 + logf(total));
      }
  }

 private:
  template <class Scores>
  static __device__ __forceinline__ float row_maximum(const Scores& scores, int m, int half) {
    float maximum = -ptx::infinity();
#pragma unroll
    for (int n = 0; n < Scores::kColumnTiles; ++n)
      maximum =
          fmaxf(maximum, fmaxf(scores.values[m][n][2 * half], scores.values[m][n][2 * half + 1]));
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
    return fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
  }

  template <class Out>
  __device__ __forceinline__ void rescale(const float (&row_max)[kRowTiles][2], Out& out,
                                          float exponent_scale) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float moved = fmaxf(reference[m][half], row_max[m][half]);
        if (moved == reference[m][half]) continue;
        const float factor = ptx::exp2_approx((reference[m][half] - moved) * exponent_scale);
        reference[m][half] = moved;
        sum[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < Out::kColumnTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) out.values[m][n][2 * half + c] *= factor;
      }
  }

  template <class Scores>
  __device__ __forceinline__ void exponentiate(Scores& scores, int m, int half,
                                               float exponent_scale) {
    // A row without keys so far has only -inf scores: 2^(-inf - 0) is the 0 it needs.
    const float offset =
        reference[m][half] == -ptx::infinity() ? 0.0f : reference[m][half] * exponent_scale;
#pragma unroll
    for (int n = 0; n < Scores::kColumnTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& value = scores.values[m][n][2 * half + c];
        value = ptx::exp2_approx(fmaf(value, exponent_scale, -offset));
        sum[m][half] += value;
      }
  }
};

}  // namespace jfa::attention
