// Backward attention on Hopper for head dims that leave no registers for both dk and dv of 64 keys
// in one warpgroup (backward.cuh has the formulas). One CTA owns a key tile of 64 keys. The two
// consumers part the work by what they compute, not by keys:
//
//   consumer of probs      scores^T, probs^T, dv, and the first panels of dq
//   consumer of dscores    dprobs^T, dscores^T, dk, and the other panels of dq
//
// They hold elements of scores^T and of dprobs^T in the same lanes, so probabilities go from one to
// the other through shared memory in any order, in fp32.
//
//   ring    stages        filled with                released
//   keys    1             k and v of the key tile    never
//   query   kQueryStages  q and lse of a query tile  by all threads of both consumers, after
//                                                    scores and after dk
//   dout    kDoutStages   dout and delta             by all threads of both consumers, after dv
//                                                    and after dprobs
//   probs   1             probabilities, by all      by all threads of the consumer of dscores
//                         threads of their consumer
//
//   barrier    threads               what it orders
//   1 + stage  both consumers (256)  dscores are there
//   3 + stage  both                  the consumer of probs has computed dq from them
//   5          of dscores (128)      all its warps have stored their dscores
//
// Scores of the next step start while dq of the last one is added, so that the exponentials run
// beside products of the other consumer. dq of the consumer of probs lags by one step.
#pragma once

#include <sm90/backward_steps.cuh>

namespace jfa::sm90 {

template <class Config>
struct WideBackwardShapes {
  static_assert(Config::kTileQ == 64 && Config::kTileK == 64, "scores are one product");
  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kQuerySteps = Config::kTileQ / 16;
  static constexpr int kKeySteps = Config::kTileK / 16;

  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<Config::kTileK, Config::kHeadDim>;
  using DscoresTile = tile::SharedTile<Config::kTileQ, Config::kTileK>;
  using Scores = tile::Accumulator<1, kQuerySteps>;
  using Probs = tile::RegisterOperand<1, kQuerySteps>;
  using KeyGradient = tile::Accumulator<1, kHeadDimSteps>;

  // dq is computed panel by panel: the first one or two by the consumer of probs.
  static constexpr int kPanels = KeyTile::kPanels;
  static constexpr int kPanelsOfProbs = (kPanels + 1) / 2;
  static_assert(kPanels >= 2 && kPanels <= 4, "each consumer has some");
  static __device__ constexpr int panel_steps(int panel) {
    return kHeadDimSteps - 4 * panel < 4 ? kHeadDimSteps - 4 * panel : 4;
  }
  template <int kPanel>
  using QueryGradient = tile::Accumulator<1, panel_steps(kPanel)>;
  // Where a panel of dq starts in its query tile, in floats.
  static __device__ constexpr int query_gradient_offset(int panel) {
    return panel * Config::kTileQ * tile::kPanelColumns;
  }

  using QueryRing = tile::Ring<Config::kQueryStages>;
  using DoutRing = tile::Ring<Config::kDoutStages>;
  using KeyRing = tile::Ring<1>;
  using ProbsRing = tile::Ring<1>;
  using QueryPosition = tile::RingPosition<Config::kQueryStages>;
  using DoutPosition = tile::RingPosition<Config::kDoutStages>;
  static constexpr int kStatisticsBytes = Config::kTileQ * 4;
  static constexpr int kProbsBytes = Config::kTileQ * Config::kTileK * 4;
  static constexpr int kStagingBytes = Config::kTileQ * tile::kPanelColumns * 4;

  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kQueryOffset = kValueOffset + KeyTile::kBytes;
  static constexpr int kDoutOffset = kQueryOffset + Config::kQueryStages * QueryTile::kBytes;
  static constexpr int kDscoresOffset = kDoutOffset + Config::kDoutStages * QueryTile::kBytes;
  static constexpr int kProbsOffset = kDscoresOffset + 2 * DscoresTile::kBytes;
  static constexpr int kStagingOffset = kProbsOffset + kProbsBytes;
  static constexpr int kLseOffset = kStagingOffset + 2 * kStagingBytes;
  static constexpr int kDeltaOffset = kLseOffset + Config::kQueryStages * kStatisticsBytes;
  static constexpr int kQueryRingOffset = kDeltaOffset + Config::kDoutStages * kStatisticsBytes;
  static constexpr int kDoutRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kKeyRingOffset = kDoutRingOffset + DoutRing::kBytes;
  static constexpr int kProbsRingOffset = kKeyRingOffset + KeyRing::kBytes;
  static constexpr int kSharedBytes = kProbsRingOffset + ProbsRing::kBytes;
};

namespace wide {

constexpr int kDscoresReady = 1;  // and 2
constexpr int kDscoresRead = 3;   // and 4
constexpr int kDscoresWarps = 5;

template <int kIndex>
struct Panel {
  static constexpr int value = kIndex;
};

// What both consumers have: the CTA's walk, shared memory, and dq.
template <class Config>
struct Consumer {
  using Shapes = WideBackwardShapes<Config>;
  using Element = typename Config::Element;
  using KeyTile = typename Shapes::KeyTile;
  using DscoresTile = typename Shapes::DscoresTile;
  using Step = typename BackwardWalk<Config>::Step;

  const Sm90BackwardParams& params;
  const BackwardStages<Shapes>& stages;
  unsigned char* shared;
  BackwardWalk<Config> walk;
  int warp_row;
  typename Shapes::ProbsRing probs;
  tile::RingPosition<1> probs_at;
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;

  __device__ __forceinline__ Consumer(const Sm90BackwardParams& kernel_params,
                                      const BackwardStages<Shapes>& shared_stages,
                                      unsigned char* shared_memory)
      : params(kernel_params),
        stages(shared_stages),
        shared(shared_memory),
        walk(kernel_params.backward.attention),
        warp_row(ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32) * 16),
        probs{shared_stages.shared + Shapes::kProbsRingOffset} {}

  __device__ __forceinline__ const AttentionParams& attention() const {
    return params.backward.attention;
  }
  __device__ __forceinline__ ScoreTile tile_of(const Step& step) const {
    return {walk.place.batch, step.head, step.query_tile * Config::kTileQ, walk.first_key,
            walk.first_key + warp_row};
  }
  __device__ __forceinline__ const float* lse() const {
    return reinterpret_cast<const float*>(shared + Shapes::kLseOffset +
                                          query_at.stage() * Shapes::kStatisticsBytes);
  }
  __device__ __forceinline__ const float* delta() const {
    return reinterpret_cast<const float*>(shared + Shapes::kDeltaOffset +
                                          dout_at.stage() * Shapes::kStatisticsBytes);
  }
  // Where a thread leaves, or finds, column tile n of its probabilities.
  __device__ __forceinline__ float4& exchanged_probs(int n) const {
    return reinterpret_cast<float4*>(shared + Shapes::kProbsOffset)[n * 128 + threadIdx.x % 128];
  }

  // A panel of dq, of the step whose dscores lie in a stage.
  template <int kPanel>
  __device__ __forceinline__ void start_query_gradient(
      typename Shapes::template QueryGradient<kPanel>& dq, int stage) const {
    const tile::RowDescriptor<DscoresTile> dscores_rows(stages.shared + Shapes::kDscoresOffset, 0);
    const tile::ColumnDescriptor<KeyTile> k_columns(stages.shared + Shapes::kKeyOffset +
                                                    kPanel * KeyTile::kPanelBytes);
    tile::start_shared_product<Element, Shapes::kKeySteps>(
        dq, dscores_rows, stage * DscoresTile::kBytes, k_columns, 0);
  }
  template <int kPanel>
  __device__ __forceinline__ void add_query_gradient(
      const typename Shapes::template QueryGradient<kPanel>& dq, const Step& step) const {
    const long long row = attention::workspace_row(params.backward, walk.place.batch, step.head,
                                                   step.query_tile * Config::kTileQ);
    const tile::BulkAccumulator<typename Shapes::template QueryGradient<kPanel>> accumulator{
        params.backward.dq_accum + row * params.backward.padded_columns +
        Shapes::query_gradient_offset(kPanel)};
    constexpr int kConsumer = kPanel / Shapes::kPanelsOfProbs;
    // Panels differ in width, so a warp's place does not depend on it.
    accumulator.add(dq, shared + Shapes::kStagingOffset + kConsumer * Shapes::kStagingBytes +
                            warp_row / 16 * (Shapes::kStagingBytes / 4));
  }

  // dk or dv, and whether masked keys may have spoilt it.
  __device__ __forceinline__ void store(const TensorView& view, float factor,
                                        typename Shapes::KeyGradient& gradient) const {
    const bool spoilt = !gradient.is_finite();
    gradient.scale(factor);
    store_key_gradient<Config>(view, gradient, walk, attention().seqlen_k, warp_row);
    if constexpr (Config::kWindowed) {
      if (spoilt)
        params.backward
            .spoilt[walk.place.batch * attention().heads + walk.place.head * walk.group] = 1;
    }
    if (ptx::elect_lane()) ptx::bulk_wait_read();  // shared memory ends with the CTA
  }
};

// Threads: a whole warpgroup.
template <class Config>
__device__ __forceinline__ void consume_probs(Consumer<Config> self) {
  using Shapes = WideBackwardShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  const auto& stages = self.stages;
  const tile::RowDescriptor<typename Shapes::KeyTile> k_rows(stages.shared + Shapes::kKeyOffset, 0);
  const tile::RowDescriptor<QueryTile> q_rows(stages.shared + Shapes::kQueryOffset, 0);
  const tile::ColumnDescriptor<QueryTile> dout_columns(stages.shared + Shapes::kDoutOffset);

  typename Shapes::KeyGradient dv;
  dv.clear();
  typename Shapes::Scores scores;
  const auto start_scores = [&] {
    stages.query.wait_full(self.query_at);
    tile::start_shared_product<Element, Shapes::kHeadDimSteps>(
        scores, k_rows, 0, q_rows, self.query_at.stage() * QueryTile::kBytes);
  };

  int remaining = self.walk.steps();
  const bool any_steps = remaining > 0;
  // Where there is no step, there is no first one to work out: it is a remainder by 0.
  typename Consumer<Config>::Step step{};
  if (any_steps) step = self.walk.first();
  auto before = step;
  bool has_before = false;
  const auto finish_scores = [&] {
    ptx::wgmma_wait<0>();
    make_probs<Config>(scores, self.attention(), self.tile_of(step), self.lse());
    stages.query.release(self.query_at.stage());
    self.query_at.advance();
  };
  int dscores_stage = 0;  // of the step before
  typename Shapes::template QueryGradient<0> dq;
  // dq of the step before, in two parts. The first step has none, but its products run all the
  // same, on what lies there: ptxas serialises products that a branch may leave out.
  const auto start_before = [&] {
    if (has_before) ptx::barrier_sync(kDscoresReady + dscores_stage, 256);
    self.template start_query_gradient<0>(dq, dscores_stage);
  };
  // `start_next` starts what runs beside the addition of the last panel.
  const auto finish_before = [&](auto... start_next) {
    ptx::wgmma_wait<0>();
    if constexpr (Shapes::kPanelsOfProbs == 2) {
      if (has_before) self.template add_query_gradient<0>(dq, before);
      self.template start_query_gradient<1>(dq, dscores_stage);
    }
    (start_next(), ...);
    if constexpr (Shapes::kPanelsOfProbs == 2) ptx::wgmma_wait<sizeof...(start_next)>();
    if (has_before) {
      // The last two steps' places are not written again.
      if (remaining > 0) ptx::barrier_arrive(kDscoresRead + dscores_stage, 256);
      self.template add_query_gradient<Shapes::kPanelsOfProbs - 1>(dq, before);
      dscores_stage ^= 1;
    }
  };

  if (any_steps) {
    ptx::mbarrier_wait(stages.keys.full(0), 0);
    start_scores();
    finish_scores();
  }
#pragma unroll 1
  while (any_steps) {
    const ScoreTile tile = self.tile_of(step);
    self.probs.await_empty(self.probs_at);
#pragma unroll
    for (int n = 0; n < Shapes::Scores::kColumnTiles; ++n)
      self.exchanged_probs(n) = make_float4(scores.values[0][n][0], scores.values[0][n][1],
                                            scores.values[0][n][2], scores.values[0][n][3]);
    self.probs.finish_fill(self.probs_at);
    self.probs_at.advance();
    KeptBits<Config, typename Shapes::Scores> dropout;
    dropout.draw(self.attention(), tile.batch, tile.head, tile.layout());
    typename Shapes::Probs rounded_probs;
    round_probs<Config>(scores, dropout, rounded_probs);

    stages.dout.wait_full(self.dout_at);
    tile::start_register_product<Element>(dv, rounded_probs, dout_columns,
                                          self.dout_at.stage() * QueryTile::kBytes);
    start_before();
    ptx::wgmma_wait<1>();  // dv
    stages.dout.release(self.dout_at.stage());
    self.dout_at.advance();
    if (--remaining == 0) break;
    finish_before(start_scores);
    before = step;
    has_before = true;
    self.walk.advance(step);
    finish_scores();
  }
  if (any_steps) {
    finish_before();
    before = step;
    has_before = true;
    start_before();
    finish_before();
  }
  self.store(self.params.backward.dv, Config::kDropout ? self.attention().dropout_scale : 1.0f, dv);
}

// Threads: a whole warpgroup.
template <class Config>
__device__ __forceinline__ void consume_dscores(Consumer<Config> self) {
  using Shapes = WideBackwardShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using DscoresTile = typename Shapes::DscoresTile;
  const auto& stages = self.stages;
  const tile::RowDescriptor<typename Shapes::KeyTile> v_rows(stages.shared + Shapes::kValueOffset,
                                                             0);
  const tile::RowDescriptor<QueryTile> dout_rows(stages.shared + Shapes::kDoutOffset, 0);
  const tile::ColumnDescriptor<QueryTile> q_columns(stages.shared + Shapes::kQueryOffset);

  typename Shapes::KeyGradient dk;
  dk.clear();
  typename Shapes::Scores dprobs;
  const auto start_dprobs = [&] {
    stages.dout.wait_full(self.dout_at);
    tile::start_shared_product<Element, Shapes::kHeadDimSteps>(
        dprobs, v_rows, 0, dout_rows, self.dout_at.stage() * QueryTile::kBytes);
  };

  int remaining = self.walk.steps();
  const bool any_steps = remaining > 0;
  typename Consumer<Config>::Step step{};
  if (any_steps) step = self.walk.first();
  int dscores_stage = 0;
  int used_stages = 0;  // that hold dscores
  constexpr int kFirst = Shapes::kPanelsOfProbs;
  typename Shapes::template QueryGradient<kFirst> dq;
  // The rest of dq of a step. `start_next` starts what runs beside the addition of the last panel.
  const auto finish = [&](auto... start_next) {
    if constexpr (Shapes::kPanels > kFirst + 1) {
      ptx::wgmma_wait<0>();
      self.template add_query_gradient<kFirst>(dq, step);
      typename Shapes::template QueryGradient<kFirst + 1> last_dq;
      self.template start_query_gradient<kFirst + 1>(last_dq, dscores_stage);
      (start_next(), ...);
      ptx::wgmma_wait<sizeof...(start_next)>();  // the last panel
      self.template add_query_gradient<kFirst + 1>(last_dq, step);
    } else {
      ptx::wgmma_wait<0>();
      (start_next(), ...);
      self.template add_query_gradient<kFirst>(dq, step);
    }
  };
  if (any_steps) {
    ptx::mbarrier_wait(stages.keys.full(0), 0);
    start_dprobs();
    ptx::wgmma_wait<0>();
  }
#pragma unroll 1
  while (any_steps) {
    const ScoreTile tile = self.tile_of(step);
    const attention::ScoreTransform<Config> transform(self.attention(), tile.batch, tile.head);
    KeptBits<Config, typename Shapes::Scores> dropout;
    dropout.draw(self.attention(), tile.batch, tile.head, tile.layout());
    stages.query.wait_full(self.query_at);
    self.probs.wait_full(self.probs_at);
#pragma unroll
    for (int n = 0; n < Shapes::Scores::kColumnTiles; ++n) {
      const float4 exchanged = self.exchanged_probs(n);
      const float probs[4] = {exchanged.x, exchanged.y, exchanged.z, exchanged.w};
      make_dscores<Config>(dprobs, n, probs, dropout, transform, tile.layout(),
                           self.attention().dropout_scale, self.delta(), self.lse());
    }
    self.probs.release(self.probs_at.stage());
    self.probs_at.advance();
    stages.dout.release(self.dout_at.stage());
    self.dout_at.advance();
    typename Shapes::Probs rounded_dscores;
    rounded_dscores.template pack<Element>(dprobs);
    if (used_stages == 2) {
      ptx::barrier_sync(kDscoresRead + dscores_stage, 256);
    } else {
      ++used_stages;
    }
    tile::store_transposed<DscoresTile>(
        stages.shared + Shapes::kDscoresOffset + dscores_stage * DscoresTile::kBytes,
        rounded_dscores, self.warp_row / 16);
    ptx::fence_async_proxy();
    ptx::barrier_arrive(kDscoresReady + dscores_stage, 256);
    tile::start_register_product<Element>(dk, rounded_dscores, q_columns,
                                          self.query_at.stage() * QueryTile::kBytes);
    ptx::barrier_sync(kDscoresWarps, 128);
    self.template start_query_gradient<kFirst>(dq, dscores_stage);
    ptx::wgmma_wait<1>();  // dk
    stages.query.release(self.query_at.stage());
    self.query_at.advance();
    if (--remaining == 0) break;
    finish(start_dprobs);
    dscores_stage ^= 1;
    self.walk.advance(step);
    ptx::wgmma_wait<0>();  // dprobs
  }
  if (any_steps) finish();
  self.store(self.params.backward.dk, self.attention().softmax_scale, dk);
}

}  // namespace wide

template <class Config>
__device__ __forceinline__ void wide_backward(const Sm90BackwardParams& params,
                                              unsigned char* shared) {
  using Shapes = WideBackwardShapes<Config>;
  const BackwardStages<Shapes> stages(tile::shared_address(shared));
  if (threadIdx.x == 0) {
    stages.query.init(kBackwardConsumers * 128);
    stages.dout.init(kBackwardConsumers * 128);
    stages.keys.init(1);
    typename Shapes::ProbsRing{stages.shared + Shapes::kProbsRingOffset}.init(128, /*fillers=*/128);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 0) {
    ptx::release_registers<kBackwardProducerRegisters>();
    if (ptx::uniform(static_cast<int>(threadIdx.x) / 32) == 0 && ptx::elect_lane())
      produce_backward<Config>(params, stages);
  } else {
    ptx::claim_registers<kBackwardConsumerRegisters>();
    const wide::Consumer<Config> consumer(params, stages, shared);
    if (warpgroup == 1) {
      wide::consume_probs<Config>(consumer);
    } else {
      wide::consume_dscores<Config>(consumer);
    }
  }
}

// dq = scale * its fp32 sums, rounded. One CTA serves one query tile of one head; its two halves
// read what the two consumers added.
template <class Config>
__device__ __forceinline__ void wide_backward_postprocess(const BackwardParams& params,
                                                          unsigned char* shared) {
  using Shapes = WideBackwardShapes<Config>;
  const QueryGradientTile<Config, typename Shapes::QueryTile> tile(params);
  bool finite = true;
  const auto stage = [&](auto panel_constant) {
    constexpr int kPanel = decltype(panel_constant)::value;
    if constexpr (kPanel < Shapes::kPanels)
      finite &= tile.stage(typename Shapes::template QueryGradient<kPanel>(),
                           Shapes::query_gradient_offset(kPanel), 4 * kPanel, shared);
  };
  if (threadIdx.x < 128) {
    stage(wide::Panel<0>());
    stage(wide::Panel<1>());
  } else {
    stage(wide::Panel<2>());
    stage(wide::Panel<3>());
  }
  tile.store(finite, shared);
}

}  // namespace jfa::sm90
