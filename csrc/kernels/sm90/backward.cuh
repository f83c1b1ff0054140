// Backward attention on Hopper. With scores = scale q k^T, probs = exp(scores - lse) and
// dprobs = dout v^T, for every visible pair of a query tile and a key tile:
//
//   dv += probs^T dout      dscores = probs (dprobs - delta)
//   dk += scale dscores^T q     dq += scale dscores k
//
// One CTA stays on each multiprocessor and takes one key tile of one key head after the other; with
// each it walks the query tiles of all query heads of the head's group, or a part of one's
// (attention/query_group.cuh). One warp (the producer) keeps the copy engine busy, which brings
// tiles and takes dq; two warpgroups (consumers) own 64 keys each. They compute scores^T and
// dprobs^T, rows being keys, so that probs^T and dscores^T feed dv and dk from registers; only
// dscores goes to shared memory, for dq, of which each consumer has a part of the columns, or with
// tiles of 128 queries half of the rows. dq gathers in fp32 in global memory
// (tile/bulk_accumulator.cuh). The three warps beside the producer prepare the rows of heads to
// come and round dq of heads that are done (sm90/row_service.cuh), or, deterministic, two of them
// send dq in order.
//
//   ring    stages        filled with                released
//   keys    1             k of a key tile, and its   by each consumer's threads, after the last dq
//                         place
//   values  1             v of it                    by each consumer's threads, after the last
//                                                    dprobs
//   service 2             the place of a key tile    by a thread of each service warp, or by each
//                                                    that sends in order
//   query   kQueryStages  q and lse of a query tile  by each consumer's threads, after dk
//   dout    kDoutStages   dout and delta             by each consumer's threads, after dv
//   sums    1, of each    a consumer's part of dq,   by who sends it, when the copy engine has
//           consumer      by all its threads         read it
//
//   barrier  threads               what it orders
//   1, 2     both consumers (256)  the turns of consumer 0 and of consumer 1
//
// In its turn a consumer starts dv, dq and dk of a step, then scores and dprobs of the next, and
// passes the turn on; its exponentials run while the other has its turn. What else it does in its
// turn, it does beside products that are queued: dq is staged beside dk, and the fence that dq
// needs before it is sent comes behind all turns but the last (docs/tuning.md has what a turn's
// parts take). A turn that comes says besides that the other consumer has stored its dscores, of
// this step for consumer 1 and of the step before for consumer 0, whose dq therefore lags by one,
// and that it has read the dscores whose place is written next. Two stages of dscores suffice.
#pragma once

#include <sm90/backward_steps.cuh>
#include <sm90/fused_place.cuh>
#include <sm90/fused_stages.cuh>
#include <sm90/query_gradient_sender.cuh>
#include <sm90/row_service.cuh>
#include <sm90/tile_places.cuh>

namespace jfa::sm90 {

constexpr int kTurnBarrier = 1;  // and 2

// Threads: one.
template <class Config>
__device__ __forceinline__ void produce_backward(const Sm90FusedBackwardParams& params,
                                                 const FusedBackwardStages<Config>& stages) {
  using Shapes = BackwardShapes<Config>;
  using KeyTile = typename Shapes::KeyTile;
  using Service = RowService<Config, Shapes>;
  const AttentionParams& attention = params.backward.attention;
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;
  typename Shapes::KeyPosition keys_at;  // counts key tiles; that of values, too
  typename Shapes::ServicePosition service_at;
  QueryGradientSender<Config> sender(params.backward, stages);
  int steps_before = 0;  // of the key tiles before this one
  // Of the key tile whose additions are not all known to be there; the sender is with it.
  attention::TilePlace untold{kNoTile, 0, 0};
  const auto tell = [&] {
    if (untold.tile == kNoTile) return;
    sender.send_until(steps_before);  // all of its own: it was the last before this one
    Service(params, stages.memory, untold).tell_added();
    untold.tile = kNoTile;
  };

  unsigned index = take_key_tile<Config>(params, /*is_first=*/true);
#pragma unroll 1
  while (true) {
    const bool ends = index >= fused_key_tiles<Config>(params);
    attention::TilePlace place{kNoTile, 0, 0};
    if (!ends) place = fused_place<Config>(params, index);
    if constexpr (Shapes::kIdleWarpsWork) {
      // Who waits for other CTAs tells first: one of them may wait for the key tile before.
      if (!stages.service.is_empty(service_at)) tell();
      stages.service.await_empty(service_at);
    }
    stages.places.put(keys_at.fills % Shapes::kPlaces, place);
    if constexpr (Shapes::kIdleWarpsWork) {
      stages.service.announce(service_at, 0);
      service_at.advance();
    }
    const FusedWalk<Config> walk(attention, place);
    const int steps = ends ? 0 : walk.steps();
    bool follows = false;
    const auto follow = [&] {
      if (follows) return;
      tell();
      sender.begin(walk);
      untold = place;
      follows = true;
    };
    if (steps == 0) {
      sender.send_until(steps_before);
      stages.values.await_empty(keys_at);
      stages.values.announce(keys_at, 0);
      stages.keys.await_empty(keys_at);
      stages.keys.announce(keys_at, 0);
      keys_at.advance();
      if (ends) break;
    } else {
      const Service service(params, stages.memory, place);
      const bool is_first = keys_at.fills == 0;  // does not wait for the kernel before
      // Asked before consumers are done with the key tile before, when k would wait for the answer.
      const bool is_prepared = !is_first && service.is_prepared();
      load_queries<Config>(
          params.q, params.dout, params.backward,
          static_cast<const BackwardStages<Shapes>&>(stages), walk, query_at, dout_at,
          [&] {
            const auto load = [&](const auto& ring, int offset, const TensorMap& map, int batches) {
              ring.await_empty(keys_at);
              ring.announce(keys_at, KeyTile::kBytes);
              load_tile<KeyTile>(stages.shared + offset, map, ring.full(0), ptx::kEvictLast,
                                 walk.first_key,
                                 attention::own_key_head(params.backward, walk.place.head),
                                 attention::own_batch(walk.place.batch, batches));
            };
            // Consumers use v of a key tile for the last time a step before k, and before that they
            // wait for all parts of dq but the last step's to be sent.
            sender.send_until(steps_before - 1);
            load(stages.values, Shapes::kValueOffset, params.v, attention.v.batches);
            if (!is_first && !is_prepared) {
              if (!service.is_prepared()) tell();
              service.await_prepared();
            }
            load(stages.keys, Shapes::kKeyOffset, params.k, attention.k.batches);
            if (is_first) service.await_prepared();
            keys_at.advance();
          },
          // The stage of query tile n is let go of in step n - kQueryStages. What consumers have
          // told of until then, the parts of the steps before, is sent first.
          [&](int n) {
            const int until = steps_before + n - min(Config::kQueryStages, Config::kDoutStages);
            if (until > steps_before) follow();
            sender.send_until(until);
          });
    }
    follow();
    steps_before += steps;
    ptx::await_previous_grid();  // also without steps, since who waits for this grid waits for both
    index = take_key_tile<Config>(params, /*is_first=*/false);
  }
  tell();
}

// Which of the consumers runs a piece of code.
//
// Both run the same one where their parts of dq have one shape. With code for each, what a key tile
// goes through, with the producer's and the service's, is more than the instruction cache holds:
// under a causal mask warps waited for instructions a quarter of their time (docs/tuning.md).
template <int kNumber>
struct KnownConsumer {
  static constexpr int kShape = kNumber;  // whose part of dq has that shape
  __device__ __forceinline__ constexpr operator int() const { return kNumber; }
};
struct EitherConsumer {
  static constexpr int kShape = 0;
  int number;
  __device__ __forceinline__ operator int() const { return number; }
};

// Threads: a whole warpgroup.
template <class Config, class Consumer>
__device__ __forceinline__ void consume_backward(const Sm90FusedBackwardParams& params,
                                                 const FusedBackwardStages<Config>& stages,
                                                 const Consumer consumer) {
  using Shapes = BackwardShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  using DscoresTile = typename Shapes::DscoresTile;
  using Scores = typename Shapes::Scores;
  using Step = typename FusedWalk<Config>::Step;
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;

  using QueryGradient = typename Shapes::template QueryGradient<Consumer::kShape>;
  constexpr bool kHasQueryGradient = Shapes::query_gradient_steps(Consumer::kShape) > 0;
  const int first_row = consumer * 64;
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32);
  const int warp_row = first_row + warp * 16;

  const tile::RowDescriptor<KeyTile> k_rows(stages.shared + Shapes::kKeyOffset, first_row);
  const tile::RowDescriptor<KeyTile> v_rows(stages.shared + Shapes::kValueOffset, first_row);
  const tile::RowDescriptor<QueryTile> q_rows(stages.shared + Shapes::kQueryOffset, 0);
  const tile::RowDescriptor<QueryTile> dout_rows(stages.shared + Shapes::kDoutOffset, 0);
  const tile::ColumnDescriptor<QueryTile> q_columns(stages.shared + Shapes::kQueryOffset);
  const tile::ColumnDescriptor<QueryTile> dout_columns(stages.shared + Shapes::kDoutOffset);
  const tile::RowDescriptor<DscoresTile> dscores_rows(stages.shared + Shapes::kDscoresOffset,
                                                      Shapes::kSplitsRows ? first_row : 0);
  const tile::ColumnDescriptor<KeyTile> k_columns(stages.shared + Shapes::kKeyOffset +
                                                  (Shapes::kSplitsRows ? 0 : consumer) *
                                                      Shapes::kSplitBytes);

  typename Shapes::KeyPosition keys_at;  // counts key tiles; that of values, too
  // Steps so far, of all key tiles. What they go by follows from it.
  unsigned done = 0;
  const auto query_at = [&] { return typename Shapes::QueryPosition{done}; };
  const auto dout_at = [&] { return typename Shapes::DoutPosition{done}; };
  const auto dscores_stage = [&] { return done % 2; };
  const auto sums = stages.sums(consumer);

#pragma unroll 1
  while (true) {
    stages.keys.wait_full(keys_at);
    const attention::TilePlace place = stages.place(keys_at.fills);
    if (place.tile == kNoTile) break;
    const FusedWalk<Config> walk(attention, place);
    const int batch = place.batch;
    typename Shapes::KeyGradient dk;
    typename Shapes::KeyGradient dv;
    dk.clear();
    dv.clear();
    Scores scores;
    Scores dprobs;
    KeptBits<Config, Scores> dropout;
    // Dropout takes a register.
    constexpr int kAhead = Scores::kColumnTiles / (Config::kDropout ? 4 : 2);
    ColumnStatistics<Scores, kAhead> lse;
    ColumnStatistics<Scores, kAhead> delta;
    QueryGradient dq;
    // What the tile before has left in them would stay in registers.
    scores.clear();
    dprobs.clear();
    dq.clear();

    const auto start_scores = [&](const typename Shapes::QueryPosition& at) {
      tile::start_shared_product<Element, Shapes::kHeadDimSteps, !Shapes::kScoresFirst>(
          scores, k_rows, 0, q_rows, at.stage() * QueryTile::kBytes);
    };
    const auto statistics = [&](int offset, int stage) {
      return reinterpret_cast<const float*>(stages.memory + offset +
                                            stage * Shapes::kStatisticsBytes);
    };
    const auto start_dprobs = [&] {
      tile::start_shared_product<Element, Shapes::kHeadDimSteps, true>(
          dprobs, v_rows, 0, dout_rows, dout_at().stage() * QueryTile::kBytes);
    };
    // dq of the step whose dscores lie in a stage.
    const auto start_query_gradient = [&](int stage) {
      if constexpr (kHasQueryGradient) {
        tile::start_shared_product<Element, Shapes::kKeySteps, true>(
            dq, dscores_rows, stage * DscoresTile::kBytes, k_columns, 0);
      } else {
        ptx::wgmma_commit();
      }
    };
    const auto tile_of = [&](const Step& step) {
      return ScoreTile{batch, step.head, step.query_tile * Config::kTileQ, walk.first_key,
                       walk.first_key + warp_row};
    };
    const auto finish_scores = [&](const Step& step) {
      const ScoreTile tile = tile_of(step);
      make_probs<Config>(scores, attention, tile, lse);
      dropout.draw(attention, batch, step.head, tile.layout());
    };
    const auto finish_dprobs = [&](const Step& step) {
      const ScoreTile tile = tile_of(step);
      const attention::ScoreTransform<Config> transform(attention, batch, step.head);
#pragma unroll
      for (int n = 0; n < Scores::kColumnTiles; ++n)
        make_dscores<Config>(dprobs, n, scores.values[0][n], dropout, transform, tile.layout(),
                             attention.dropout_scale, delta.take(n),
                             statistics(Shapes::kLseOffset, query_at().stage()));
    };

    const int steps = walk.steps();
    int remaining = steps;
    Step step{};
    // From products that have been started to probabilities, and to dprobs that have come.
    const auto finish_products = [&] {
      lse.load(statistics(Shapes::kLseOffset, query_at().stage()));
      ptx::wgmma_wait<1>();  // scores
      finish_scores(step);
      delta.load(statistics(Shapes::kDeltaOffset, dout_at().stage()));
      ptx::wgmma_wait<0>();  // dprobs
      if (remaining == 1) stages.values.release(0);
    };

    // parts: of this consumer, staged before.
    const auto stage_query_gradient = [&](unsigned parts) {
      if constexpr (kHasQueryGradient) {
        sums.await_empty(typename Shapes::SumsPosition{parts});
        tile::BulkAccumulator<QueryGradient>::stage(dq, stages.staged_sums(consumer));
      }
    };
    const auto announce_query_gradient = [&](bool is_staged) {
      if constexpr (kHasQueryGradient) {
        ptx::fence_async_proxy();
        if (is_staged) sums.finish_fill(typename Shapes::SumsPosition{});
      }
    };

    if (remaining > 0) {
      step = walk.first();
      if (consumer == 1) ptx::barrier_arrive(kTurnBarrier, 256);  // the first turn
      stages.query.wait_full(query_at());
      start_scores(query_at());
      stages.values.wait_full(keys_at);
      stages.dout.wait_full(dout_at());
      start_dprobs();
      finish_products();
    }
#pragma unroll 1
    while (remaining > 0) {
      typename Shapes::Probs rounded_probs;
      round_probs<Config>(scores, dropout, rounded_probs);
      finish_dprobs(step);
      typename Shapes::Probs rounded_dscores;
      rounded_dscores.template pack<Element>(dprobs);
      tile::store_transposed<DscoresTile>(
          stages.shared + Shapes::kDscoresOffset + dscores_stage() * DscoresTile::kBytes,
          rounded_dscores, consumer * 4 + warp);
      ptx::fence_async_proxy();

      ptx::barrier_sync(kTurnBarrier + consumer, 256);  // dscores are there, see the table above
      tile::start_register_product<Element>(dv, rounded_probs, dout_columns,
                                            dout_at().stage() * QueryTile::kBytes);
      start_query_gradient(consumer == 0 ? dscores_stage() ^ 1 : dscores_stage());
      tile::start_register_product<Element>(dk, rounded_dscores, q_columns,
                                            query_at().stage() * QueryTile::kBytes);
      ptx::wgmma_wait<1>();  // dv and dq
      // Every thread has read lse and delta for itself.
      stages.dout.release(dout_at().stage());
      const typename Shapes::QueryPosition next_query{done + 1};
      if (remaining > 1) stages.query.wait_full(next_query);
      // Behind the last step, of what lies there, and nobody looks at it.
      if constexpr (Shapes::kScoresFirst) start_scores(next_query);
      // In its first turn the first consumer finds no dscores.
      const bool has_part = consumer == 1 || remaining < steps;
      if (has_part) stage_query_gradient(done - (consumer == 0));
      if (--remaining == 0) {
        announce_query_gradient(has_part);
        ptx::wgmma_wait<0>();  // dk
        stages.query.release(query_at().stage());
        ++done;
        ptx::barrier_arrive(kTurnBarrier + 1 - consumer, 256);
        break;
      }
      if constexpr (!Shapes::kScoresFirst) start_scores(next_query);
      ptx::wgmma_wait<1>();  // dk
      stages.query.release(query_at().stage());
      ++done;
      stages.dout.wait_full(dout_at());
      start_dprobs();
      ptx::barrier_arrive(kTurnBarrier + 1 - consumer, 256);
      announce_query_gradient(has_part);
      walk.advance(step);
      finish_products();
    }

    const auto store_key_gradients = [&] {
      // Read again: kept, it would take registers from the loop above.
      const attention::TilePlace stored = stages.place(keys_at.fills);
      const bool spoilt = !dk.is_finite() || !dv.is_finite();
      dk.scale(attention.softmax_scale);
      if constexpr (Config::kDropout) dv.scale(attention.dropout_scale);
      store_key_gradient<Config>(backward.dk, dk, stored, attention.seqlen_k, warp_row);
      store_key_gradient<Config>(backward.dv, dv, stored, attention.seqlen_k, warp_row);
      if constexpr (Config::kWindowed) {
        if (spoilt)
          backward.spoilt[stored.batch * attention.heads +
                          attention::first_query_head(attention, stored.head)] = 1;
      }
    };
    if (steps == 0) stages.values.release(0);
    if (consumer == 1) stages.keys.release(0);
    store_key_gradients();
    if (consumer == 0) {
      if (steps > 0) {
        ptx::barrier_sync(kTurnBarrier, 256);
        start_query_gradient(dscores_stage() ^ 1);
        ptx::wgmma_wait<0>();
        stages.keys.release(0);
        stage_query_gradient(done - 1);
        announce_query_gradient(true);
      } else {
        stages.keys.release(0);
      }
    }
    keys_at.advance();
  }
}

// Threads: a service warp.
template <class Config>
__device__ __forceinline__ void serve_rows(const Sm90FusedBackwardParams& params,
                                           const FusedBackwardStages<Config>& stages) {
  using Shapes = BackwardShapes<Config>;
  typename Shapes::ServicePosition at;
  ServiceStaging::Position piece_at;
#pragma unroll 1
  while (true) {
    stages.service.wait_full(at);
    const attention::TilePlace place = stages.place(at.fills);
    if (place.tile == kNoTile) break;
    RowService<Config, Shapes>(params, stages.memory, place).serve(piece_at);
    if (ptx::elect_lane()) stages.service.release(at.stage());
    __syncwarp();
    at.advance();
  }
}

template <class Config>
__device__ __forceinline__ void backward(const Sm90FusedBackwardParams& params,
                                         unsigned char* shared) {
  using Shapes = BackwardShapes<Config>;
  ptx::start_next_grid();
  const FusedBackwardStages<Config> stages(shared);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(params.q);
    ptx::prefetch_tensor_map(params.k);
    ptx::prefetch_tensor_map(params.v);
    ptx::prefetch_tensor_map(params.dout);
    stages.init();
  }
  if constexpr (Config::kServesRows) ServiceStaging::clear(stages.memory + Shapes::kServiceOffset);
  __syncthreads();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 0) {
    ptx::release_registers<Shapes::kProducerRegisters>();
    const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp == 0) {
      if (ptx::elect_lane()) produce_backward<Config>(params, stages);
    } else if constexpr (Config::kServesRows) {
      serve_rows<Config>(params, stages);
    } else if constexpr (Config::kDeterministic) {
      if (warp == 1) {
        if (ptx::elect_lane()) send_in_order<Config, 0>(params, stages);
      } else if (warp == 2 && Shapes::kParts() > 1) {
        if (ptx::elect_lane()) send_in_order<Config, 1>(params, stages);
      }
    }
  } else {
    ptx::claim_registers<Shapes::kConsumerRegisters>();
    if constexpr (Shapes::query_gradient_steps(0) == Shapes::query_gradient_steps(1)) {
      consume_backward<Config>(params, stages, EitherConsumer{warpgroup - 1});
    } else if (warpgroup == 1) {
      consume_backward<Config>(params, stages, KnownConsumer<0>());
    } else {
      consume_backward<Config>(params, stages, KnownConsumer<1>());
    }
  }
}

// dq = scale * its fp32 sums, rounded, of the groups of heads that the main kernel leaves. One CTA
// serves one query tile of one head; its two halves read the parts of the two consumers.
template <class Config>
__device__ __forceinline__ void backward_postprocess(const BackwardParams& params,
                                                     unsigned char* shared) {
  using Shapes = BackwardShapes<Config>;
  ptx::await_previous_grid();
  const AttentionParams& attention = params.attention;
  const int query_tiles = (attention.seqlen_q + Config::kTileQ - 1) / Config::kTileQ;
  const int rounded_heads =
      attention.batch * attention.heads - static_cast<int>(gridDim.x) / query_tiles;
  const int rounded_tiles = rounded_heads * query_tiles;
  const QueryGradientTile<Config, typename Shapes::QueryTile> tile(
      params, attention::place_of(rounded_tiles + blockIdx.x, query_tiles, attention.heads));
  bool finite = true;
  if (threadIdx.x < 128) {
    finite = tile.stage(tile::Accumulator<1, Shapes::query_gradient_steps(0)>(), 0, 0, 0, shared);
  } else if constexpr (Shapes::query_gradient_steps(1) > 0) {
    finite = tile.stage(tile::Accumulator<1, Shapes::query_gradient_steps(1)>(),
                        Shapes::query_gradient_offset(1), Shapes::kSplitsRows ? 64 : 0,
                        Shapes::kSplitsRows ? 0 : Shapes::kSplitSteps, shared);
  }
  tile.store(finite, shared);
  if constexpr (Config::kWindowed) {
#pragma unroll 1
    for (int i = blockIdx.x; i < rounded_tiles; i += gridDim.x) {
      const attention::TilePlace place = attention::place_of(i, query_tiles, attention.heads);
      const bool spoilt = params.dq_spoilt[place.batch * attention.heads + place.head] != 0;
      attention::contain_gradients<Config>(params, place, spoilt, tile.kThreads / 32);
    }
  }
}

}  // namespace jfa::sm90
