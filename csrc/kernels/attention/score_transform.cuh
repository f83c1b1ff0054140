// From raw products q.k to the scores that softmax sees, in units of log2: scale, softcap, ALiBi,
// mask, in that order. A feature that Config leaves off leaves no instruction.
#pragma once

#include <attention/score_layout.cuh>
#include <attention/visible_range.cuh>
#include <params/attention_params.h>
#include <ptx/math.cuh>

namespace jfa::attention {

// Softmax works on exponent_scale * score. Without a transform the scale stays out of the scores
// and costs nothing, being part of the fused multiply-add before each exponential; that needs a
// positive scale, since the row maximum is taken before it. kScoresScaled says that the transform
// has applied it.
template <class Config>
struct ScoreTransform {
  float exponent_scale;
  float scale_log2;     // softmax_scale * log2(e)
  float softcap_input;  // 2 * softmax_scale * log2(e) / softcap
  float softcap_log2;   // softcap * log2(e)
  float inverse_softcap_log2;
  float slope_log2;  // ALiBi slope * log2(e)
  int bottom_right;  // seqlen_k - seqlen_q

  __device__ __forceinline__ ScoreTransform(const AttentionParams& params, int batch, int head)
      : scale_log2(params.softmax_scale * ptx::kLog2E),
        bottom_right(params.seqlen_k - params.seqlen_q) {
    exponent_scale = Config::kScoresScaled ? 1.0f : scale_log2;
    if constexpr (Config::kSoftcap) {
      softcap_input = 2.0f * scale_log2 / params.softcap;
      softcap_log2 = params.softcap * ptx::kLog2E;
      inverse_softcap_log2 = 1.0f / softcap_log2;
    }
    if constexpr (Config::kAlibi) {
      const float* slopes = static_cast<const float*>(params.slopes.data);
      slope_log2 =
          slopes[static_cast<long long>(batch % params.slopes.batches) * params.heads + head] *
          ptx::kLog2E;
    }
  }

  __device__ __forceinline__ float alibi_bias(int query, int key) const {
    return -slope_log2 * fabsf(static_cast<float>(query + bottom_right - key));
  }

  // The score of a product q.k.
  __device__ __forceinline__ float score(float product, int query, int key) const {
    if constexpr (!Config::kScoresScaled) return product;
    float score = product * scale_log2;
    if constexpr (Config::kSoftcap) {
      // tanh(x) = 1 - 2 / (1 + e^2x), exact to fp32 rounding of its absolute value;
      // tanh.approx has only 11 bits, which shows at large caps.
      const float exponential = ptx::exp2_approx(product * softcap_input);
      score = softcap_log2 - 2.0f * softcap_log2 * ptx::reciprocal_approx(1.0f + exponential);
    }
    if constexpr (Config::kAlibi) score += alibi_bias(query, key);
    return score;
  }

  // log2 of a probability. lse_log2 is lse in units of log2, +inf where a row has no probabilities.
  __device__ __forceinline__ float exponent(float score, float lse_log2) const {
    return fmaf(score, exponent_scale, -lse_log2);
  }
  __device__ __forceinline__ float prob(float score, float lse_log2) const {
    return ptx::exp2_approx(exponent(score, lse_log2));
  }

  // The gradient of the scaled product; dprob = dout.v, after dropout.
  __device__ __forceinline__ float dscore(float prob, float dprob, float delta, float lse_log2,
                                          int query, int key) const {
    const float gradient = prob * (dprob - delta);
    if constexpr (!Config::kSoftcap) return gradient;
    return gradient * softcap_derivative(prob, lse_log2, query, key);
  }

  template <class Acc, class Layout>
  __device__ __forceinline__ void apply(Acc& scores, const Layout& layout) const {
    if constexpr (Config::kScoresScaled) {
#pragma unroll
      for (int m = 0; m < Acc::kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < Acc::kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& value = scores.values[m][n][i];
            value = score(value, layout.query(m, n, i), layout.key(m, n, i));
          }
    }
  }

  // d(capped score) / d(scaled score) = 1 - tanh^2, from the probability that the score became:
  // its log2 gives the score back, so that no copy of the scores is kept. A probability of 0 has no
  // gradient, and any finite derivative leaves it so: where its logarithm makes that -inf or NaN,
  // fmaxf makes it 0, without a branch.
  __device__ __forceinline__ float softcap_derivative(float prob, float lse_log2, int query,
                                                      int key) const {
    float score = ptx::log2_approx(prob) + lse_log2;
    if constexpr (Config::kAlibi) score -= alibi_bias(query, key);
    const float tanh_value = score * inverse_softcap_log2;
    return fmaxf(0.0f, fmaf(-tanh_value, tanh_value, 1.0f));
  }
};

// Sets the scores of columns outside [first, last], relative to a lane's first column, to -inf, in
// row m, half `half`. The columns inside become bits, which predicate registers take seven at a
// time, where comparisons would take two instructions each.
template <class Layout, class Acc>
__device__ __forceinline__ void mask_columns(Acc& scores, int m, int half, int first, int last) {
  constexpr int kTilesPerWord = 16;
  const int begin = Layout::columns_up_to(first - 1);
  const int end = Layout::columns_up_to(last);
#pragma unroll
  for (int word = 0; word * kTilesPerWord < Acc::kColumnTiles; ++word) {
    const unsigned visible =
        ptx::low_bits(max(0, end - 32 * word)) & ~ptx::low_bits(max(0, begin - 32 * word));
#pragma unroll
    for (int n = word * kTilesPerWord; n < min((word + 1) * kTilesPerWord, Acc::kColumnTiles); ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if ((visible & (1u << (2 * (n % kTilesPerWord) + c))) == 0)
          scores.values[m][n][2 * half + c] = -ptx::infinity();
  }
}

// Sets the scores that their query can't see to -inf, by index: what was computed there, from
// padding or not, is never looked at.
template <class Config, class Acc, class Layout>
__device__ __forceinline__ void mask_scores(Acc& scores, const Layout& layout,
                                            const VisibleRange<Config>& range) {
  static_assert(!Layout::kTransposed, "rows are queries");
#pragma unroll
  for (int m = 0; m < Acc::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = layout.query(m, 0, 2 * half);
      mask_columns<Layout>(scores, m, half,
                           Config::kWindowed ? range.first_visible(query) - layout.first_key : 0,
                           range.last_visible(query) - layout.first_key);
    }
}

// The same for scores^T, whose rows are keys.
template <class Config, class Acc>
__device__ __forceinline__ void mask_scores(Acc& scores, const TransposedScoreLayout& layout,
                                            const VisibleRange<Config>& range) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = layout.key(0, 0, 2 * half);
    mask_columns<TransposedScoreLayout>(
        scores, 0, half, Config::kWindowed ? range.first_seeing(key) - layout.first_query : 0,
        range.last_seeing(key) - layout.first_query);
  }
}

}  // namespace jfa::attention
