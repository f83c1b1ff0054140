// How dq of the fused backward gets from where consumers stage it to its sums in global memory.
#pragma once

#include <attention/head_address.cuh>
#include <ptx/tma.cuh>
#include <sm90/backward_steps.cuh>
#include <sm90/fused_stages.cuh>
#include <tile/bulk_accumulator.cuh>

namespace jfa::sm90 {

// A CTA's walk. In order, key tiles come to a query tile one after the other by themselves.
template <class Config>
using FusedWalk = BackwardWalk<Config, !Config::kDeterministic>;

// Sends the part of a step's dq that a consumer has staged, as a bulk group. Threads: one.
template <class Config, int kConsumer>
__device__ __forceinline__ void send_part(const BackwardParams& backward,
                                          const FusedBackwardStages<Config>& stages,
                                          const FusedWalk<Config>& walk,
                                          const typename FusedWalk<Config>::Step& step) {
  using Shapes = BackwardShapes<Config>;
  const long long row = attention::workspace_row(backward, walk.place.batch, step.head,
                                                 step.query_tile * Config::kTileQ);
  tile::BulkAccumulator<typename Shapes::template QueryGradient<kConsumer>>{
      backward.dq_accum + row * backward.padded_columns + Shapes::query_gradient_offset(kConsumer)}
      .send(stages.staged_sums(kConsumer));
  ptx::bulk_commit();
}

// Sends what the consumers stage of dq, in the order in which it comes: of every step the second
// consumer's part, then that of the first, which lags. Threads: one.
template <class Config>
struct QueryGradientSender {
  using Shapes = BackwardShapes<Config>;
  using Walk = FusedWalk<Config>;
  const BackwardParams& backward;
  const FusedBackwardStages<Config>& stages;
  static constexpr int kParts = Shapes::kParts();
  int steps_sent = 0;  // of all key tiles
  int first_step = 0;  // of the key tile whose parts come next, counted likewise
  int end_step = 0;
  Walk walk;
  typename Walk::Step step;

  __device__ __forceinline__ QueryGradientSender(const BackwardParams& params,
                                                 const FusedBackwardStages<Config>& shared_stages)
      : backward(params), stages(shared_stages) {}

  // Behind all parts of the key tile before.
  __device__ __forceinline__ void begin(const Walk& of_tile) {
    walk = of_tile;
    step = walk.first();
    first_step = steps_sent;
    end_step = first_step + walk.steps();
  }
  // Until the parts of so many steps have been sent.
  __device__ __forceinline__ void send_until(int steps) {
    if constexpr (!Config::kDeterministic) {  // otherwise send_in_order does
#pragma unroll 1
      for (; steps_sent < steps; ++steps_sent) {
        send<1>();
        send<0>();
        walk.advance(step);
      }
    }
  }

 private:
  template <int kConsumer>
  __device__ __forceinline__ void send() const {
    if constexpr (Shapes::query_gradient_steps(kConsumer) > 0) {
      const typename Shapes::SumsPosition at{static_cast<unsigned>(steps_sent)};
      const auto sums = stages.sums(kConsumer);
      sums.wait_full(at);
      send_part<Config, kConsumer>(backward, stages, walk, step);
      // The second consumer has a step's time until it stages again, the first one that of its dv
      // and dq: a part is let go of when the next one has been sent, but for a key tile's last,
      // which the next key tile's may follow late.
      const bool is_last = kConsumer == 0 && steps_sent + 1 == end_step;
      if constexpr (kParts == 2) {
        ptx::bulk_wait_read<1>();
        if (kConsumer == 0 || steps_sent > first_step) stages.sums(1 - kConsumer).release(0);
      }
      if (kParts == 1 || is_last) {
        ptx::bulk_wait_read<0>();
        sums.release(0);
      }
    }
  }
};

// deterministic: sends a consumer's parts when the key tiles behind this one have added theirs to a
// query tile, and no others have, counted in BackwardParams::turns. Key tiles are taken from the
// last to the first (sm90/fused_place.cuh), so that it waits for tiles that have been taken.
// Threads: one.
template <class Config, int kConsumer>
__device__ __forceinline__ void send_in_order(const Sm90FusedBackwardParams& params,
                                              const FusedBackwardStages<Config>& stages) {
  using Shapes = BackwardShapes<Config>;
  const BackwardParams& backward = params.backward;
  const attention::VisibleRange<Config> range(backward.attention);
  const auto sums = stages.sums(kConsumer);
  typename Shapes::SumsPosition at;
  typename Shapes::ServicePosition service_at;
  ptx::await_previous_grid();  // which has cleared the turns
#pragma unroll 1
  while (true) {
    stages.service.wait_full(service_at);
    const attention::TilePlace place = stages.places.read(service_at.fills % Shapes::kPlaces);
    if (place.tile == kNoTile) break;
    const FusedWalk<Config> walk(backward.attention, place);
    typename FusedWalk<Config>::Step step = walk.first();
#pragma unroll 1
    for (int remaining = walk.steps(); remaining > 0; --remaining) {
      const int first_query = step.query_tile * Config::kTileQ;
      const long long row = attention::workspace_row(backward, place.batch, step.head, first_query);
      int* const turn = backward.turns + row / kSmallestQueryTile + kConsumer;
      const int mine = range.key_tiles(first_query).end - 1 - place.tile;
      sums.wait_full(at);
      ptx::await_flag(turn, mine);
      ptx::fence_async_proxy_global();  // the copy engine adds to what it has added elsewhere
      send_part<Config, kConsumer>(backward, stages, walk, step);
      ptx::bulk_wait_read<0>();
      sums.release(0);
      ptx::bulk_wait();
      ptx::fence_async_proxy_global();
      ptx::store_release(turn, mine + 1);
      at.advance();
      walk.advance(step);
    }
    stages.service.release(service_at.stage());
    service_at.advance();
  }
}

}  // namespace jfa::sm90
