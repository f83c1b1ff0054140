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

// Where the maximum is not even looked at, the sum of the probabilities of one row and tile that a
// thread holds tells whether the reference still serves. Each of them is below the sum, so fp16,
// which ends at 2^16, holds them.
constexpr float kLargestTileSum = 4096.0f;

template <int kRowTiles>
struct OnlineSoftmax {
  float reference[kRowTiles][2];  // in score units; -inf until a key is seen
  float sum[kRowTiles][2];
  bool settled = false;  // the same in the whole warp: every row has a reference

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        reference[m][half] = -ptx::infinity();
        sum[m][half] = 0.0f;
      }
  }

  // What `out` has still to see of references that moved.
  struct Rescale {
    bool any = false;  // the same in the whole warp
    float factor[kRowTiles][2];

    template <class Out>
    __device__ __forceinline__ void apply(Out& out) const {
      if (!any) return;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) scale_row(out, m, half, factor[m][half]);
    }
  };

  // Turns scores into probabilities relative to the reference and rescales `out` when it moves.
  template <class Scores, class Out>
  __device__ __forceinline__ void update(Scores& scores, Out& out, float exponent_scale) {
    advance(scores, exponent_scale,
            [&](int m, int half, float factor) { scale_row(out, m, half, factor); });
    exponentiate(scores, exponent_scale);
  }

  // Moves the references that the maxima of `scores` have left behind, and with them the sums.
  // Calls on_move(m, half, factor) for each row that moves. Returns whether one of the warp may.
  template <class Scores, class OnMove>
  __device__ __forceinline__ bool advance(const Scores& scores, float exponent_scale,
                                          OnMove on_move) {
    float row_max[kRowTiles][2];
    bool moves = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] = row_maximum(scores, m, half);
        // -inf minus -inf is NaN and compares false: a row without keys so far does not move.
        moves |= (row_max[m][half] - reference[m][half]) * exponent_scale > kLazyRescaleLog2;
      }
    if (!__any_sync(0xffffffffu, moves)) return false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float moved = fmaxf(reference[m][half], row_max[m][half]);
        if (moved == reference[m][half]) continue;
        const float factor = ptx::exp2_approx((reference[m][half] - moved) * exponent_scale);
        reference[m][half] = moved;
        sum[m][half] *= factor;
        on_move(m, half, factor);
      }
    return true;
  }

  // Turns scores into probabilities relative to the references and adds them to the row sums.
  template <class Scores>
  __device__ __forceinline__ void exponentiate(Scores& scores, float exponent_scale) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float offset = exponent_offset(m, half, exponent_scale);
#pragma unroll
        for (int n = 0; n < Scores::kColumnTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& value = scores.values[m][n][2 * half + c];
            value = ptx::exp2_approx(fmaf(value, exponent_scale, -offset));
            sum[m][half] += value;
          }
      }
  }

  // For a single row tile, leaving the scores as they are: calls emit(pair, left, right) with the
  // probabilities of each pair of column tiles. First with the references as they are; only where
  // a sum shows that they won't do, or a row has none, after advance(). So the usual tile costs no
  // maximum, and no exchange between threads. What comes back is for `out`, which products may
  // still be adding to: to wait for them here, where warps part ways, is not allowed.
  // kTryReference: false leaves the first attempt out, for callers whose `emit` is long.
  template <bool kTryReference, class Scores, class Emit>
  __device__ __forceinline__ Rescale attend(const Scores& scores, float exponent_scale, Emit emit) {
    float tile_sum[2];
    if (kTryReference && settled) {
      emit_probs(scores, tile_sum, exponent_scale, emit);
      const bool too_large = tile_sum[0] > kLargestTileSum || tile_sum[1] > kLargestTileSum;
      if (__builtin_expect(!__any_sync(0xffffffffu, too_large), true)) {
        sum[0][0] += tile_sum[0];
        sum[0][1] += tile_sum[1];
        return Rescale();
      }
    }
    Rescale rescale;
    rescale.factor[0][0] = rescale.factor[0][1] = 1.0f;
    rescale.any = advance(scores, exponent_scale,
                          [&](int m, int half, float factor) { rescale.factor[m][half] = factor; });
    emit_probs(scores, tile_sum, exponent_scale, emit);
    sum[0][0] += tile_sum[0];
    sum[0][1] += tile_sum[1];
    settled = __all_sync(0xffffffffu,
                         reference[0][0] > -ptx::infinity() && reference[0][1] > -ptx::infinity());
    return rescale;
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
        lse[m][half] =
            total == 0.0f
                ? -ptx::infinity()
                : ptx::kLn2 * (reference[m][half] * exponent_scale + ptx::log2_approx(total));
      }
  }

 private:
  // A row without keys so far has only -inf scores: 2^(-inf - 0) is the 0 it needs.
  __device__ __forceinline__ float exponent_offset(int m, int half, float exponent_scale) const {
    return reference[m][half] == -ptx::infinity() ? 0.0f : reference[m][half] * exponent_scale;
  }

  template <class Scores, class Emit>
  __device__ __forceinline__ void emit_probs(const Scores& scores, float (&tile_sum)[2],
                                             float exponent_scale, Emit emit) const {
    const float offset[2] = {exponent_offset(0, 0, exponent_scale),
                             exponent_offset(0, 1, exponent_scale)};
    tile_sum[0] = tile_sum[1] = 0.0f;
#pragma unroll
    for (int pair = 0; pair < Scores::kColumnPairs; ++pair) {
      float probs[2][4];
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float score = scores.values[0][2 * pair + side][i];
          probs[side][i] = ptx::exp2_approx(fmaf(score, exponent_scale, -offset[i / 2]));
          tile_sum[i / 2] += probs[side][i];
        }
      emit(pair, probs[0], probs[1]);
    }
  }

  template <class Out>
  static __device__ __forceinline__ void scale_row(Out& out, int m, int half, float factor) {
#pragma unroll
    for (int n = 0; n < Out::kColumnTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) out.values[m][n][2 * half + c] *= factor;
  }

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
};

}  // namespace jfa::attention
