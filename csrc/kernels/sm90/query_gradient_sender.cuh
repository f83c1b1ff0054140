// How dq of the fused backward gets from where consumers stage it to its sums in global memory.
#pragma once

#include <attention/head_address.cuh>
#include <ptx/tma.cuh>
#include <sm90/backward_steps.cuh>
#include <sm90/fused_stages.cuh>
#include <tile/bulk_accumulator.cuh>

namespace jfa::sm90 {

// Sends what the consumers stage of dq, in the order in which it comes: of every step the second
// consumer's part, then that of the first, which lags. Threads: one.
template <class Config>
struct QueryGradientSender {
  using Shapes = BackwardShapes<Config>;
  using Walk = BackwardWalk<Config>;
  const BackwardParams& backward;
  const FusedBackwardStages<Config>& stages;
  int steps_sent = 0;  // of all key tiles
  Walk walk;           // of the key tile whose parts come next
  typename Walk::Step step;

  __device__ __forceinline__ QueryGradientSender(const BackwardParams& params,
                                                 const FusedBackwardStages<Config>& shared_stages)
      : backward(params), stages(shared_stages) {}

  // Behind all parts of the key tile before.
  __device__ __forceinline__ void begin(const Walk& of_tile) {
    walk = of_tile;
    step = walk.first();
  }
  // Until the parts of so many steps have been sent.
  __device__ __forceinline__ void send_until(int steps) {
#pragma unroll 1
    for (; steps_sent < steps; ++steps_sent) {
      send<1>();
      send<0>();
      walk.advance(step);
    }
  }

 private:
  template <int kConsumer>
  __device__ __forceinline__ void send() const {
    if constexpr (Shapes::query_gradient_steps(kConsumer) > 0) {
      const typename Shapes::SumsPosition at{static_cast<unsigned>(steps_sent)};
      const auto sums = stages.sums(kConsumer);
      sums.wait_full(at);
      const long long row = attention::workspace_row(backward, walk.place.batch, step.head,
                                                     step.query_tile * Config::kTileQ);
      tile::BulkAccumulator<typename Shapes::template QueryGradient<kConsumer>>{
          backward.dq_accum + row * backward.padded_columns +
          Shapes::query_gradient_offset(kConsumer)}
          .send(stages.staged_sums(kConsumer));
      ptx::bulk_commit();
      ptx::bulk_wait_read();  // what comes next to send or to fetch is half a step away
      sums.release(at.stage());
    }
  }
};

}  // namespace jfa::sm90
