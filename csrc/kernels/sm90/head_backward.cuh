// Backward attention on Hopper for heads whose dq fits into shared memory, or does half by half.
// With scores = scale q k^T, probs = exp(scores - lse) and dprobs = dout v^T, for every visible
// pair of a query tile and a key tile:
//
//   dv += probs^T dout      dscores = probs (dprobs - delta)
//   dk += scale dscores^T q     dq += scale dscores k
//
// One CTA stays on each multiprocessor and takes one key head after the other, with the query heads
// that read it, and all of it: key tile by key tile it walks the query tiles, as the fused backward
// does (sm90/backward.cuh), but sums of dq stay with it, in fp32, and leave it once, in 16 bits,
// when the last key tile that a query tile sees has been added. So there are five products, no
// workspace but lse and delta, no kernel before or behind, and one order of additions.
//
// Where dq of a head does not fit, its query tiles come in passes, each with all key tiles that
// they see. Between passes dk and dv of a key tile wait in the workspace, in fp32, for the threads
// that have written them: additions are those of one walk, in its order.
//
// One warp (the producer) keeps the copy engine busy; two warpgroups (consumers) own 64 keys of a
// key tile each. They compute scores^T and dprobs^T, rows being keys, from k and v in registers, so
// that probs^T and dscores^T feed dv and dk from registers. dscores goes through shared memory to a
// warpgroup of its own (the summer), which alone knows dq: with it the chain of a consumer's steps,
// which binds, has neither that product nor the sums. The three warps beside the producer work out
// lse and delta of the rows of heads to come.
//
//   ring        stages        filled with                  released
//   keys        2, of each    64 rows of k, and behind     by a thread of the consumer, when dv has
//               consumer      them dv                      been read
//   query       kQueryStages  q and lse of a query tile    by each consumer's threads, after dk
//   dout        kDoutStages   dout and delta               by each consumer's threads, after dv
//   dscores     1, of each    dscores of a step, by the    by the summer's threads, after dq
//               consumer      consumer's threads
//   statistics  8             lse and delta of a query     by the producer, which has them copied
//                             tile, in the workspace, by
//                             threads of three warps
//
//   barrier  threads               what it orders
//   1, 2     a consumer (128)      stores and copies of what takes the place of its dscores
//   3        consumers and summer  their results, before those that are not finite are read back;
//            (384)                 rows that the other warps clear are never summed anew
//
// The summer adds what consumer 0 gives of a step before what consumer 1 does, so that neither is
// more than a step ahead of it. Each consumer starts the first products of the next step as soon as
// it can: the last step of a key tile starts the first one of the next, which runs while dk and dv
// are on their way.
//
// What binds without a mask is still the chain of a consumer's own steps: of 2,600 cycles a step at
// head dim 64 the tensor cores work 1,280 (docs/tuning.md).
#pragma once

#include <attention/containment.cuh>
#include <attention/head_address.cuh>
#include <params/backward_params.h>
#include <ptx/special_register.cuh>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <sm90/backward_steps.cuh>
#include <sm90/gradient_rows.cuh>
#include <sm90/head_stages.cuh>
#include <sm90/load_tile.cuh>
#include <sm90/query_statistics.cuh>
#include <sm90/tile_places.cuh>
#include <tile/descriptor.cuh>
#include <tile/ring.cuh>
#include <tile/shared_sums.cuh>

namespace jfa::sm90 {

// Where dk and dv of a consumer's keys wait between passes, for the threads that have written them:
// fp32, in the place of the sums of dq that other kernels have.
template <class Config>
struct HeadPartial {
  using Gradient = typename HeadBackwardShapes<Config>::Gradient;
  static constexpr int kColumnTileFloats = 128 * 4;  // four of each thread
  static constexpr int kFloats = Gradient::kColumnTiles * kColumnTileFloats;
  static constexpr int kBytes = 2 * kFloats * static_cast<int>(sizeof(float));
  float* sums;

  __device__ __forceinline__ HeadPartial(const Sm90HeadBackwardParams& params, int key_tile,
                                         int consumer)
      : sums(params.backward.dq_accum +
             ((static_cast<long long>(ptx::reread_cta()) * params.partial_tiles + key_tile) *
                  kBackwardConsumers +
              consumer) *
                 (2 * kFloats)) {}

  __device__ __forceinline__ HeadPartial of_thread() const {
    HeadPartial own = *this;
    own.sums += ptx::reread_thread() % 128 * 4;
    return own;
  }
  __device__ __forceinline__ void store(const Gradient& dk, const Gradient& dv) const {
    tile::write_sums<kColumnTileFloats>(dk, sums);
    tile::write_sums<kColumnTileFloats>(dv, sums + kFloats);
  }
  __device__ __forceinline__ void load(Gradient& dk, Gradient& dv) const {
    tile::read_sums<kColumnTileFloats>(dv, sums + kFloats);
    tile::read_sums<kColumnTileFloats>(dk, sums);
  }
};

// Threads: one.
template <class Config>
__device__ __forceinline__ void produce_head_backward(const Sm90HeadBackwardParams& params,
                                                      const HeadBackwardStages<Config>& stages) {
  using Shapes = HeadBackwardShapes<Config>;
  using KeyTile = typename Shapes::KeyTile;
  const AttentionParams& attention = params.backward.attention;
  const HeadWalk<Config> heads(attention);
  unsigned number = 0;  // of the key tile
  typename Shapes::QueryPosition query_at;
  typename Shapes::DoutPosition dout_at;
  typename Shapes::StatisticsPosition statistics_at;

  heads.for_each([&](int batch, int head) {
    const unsigned first_statistics = statistics_at.fills;
    const int query_tiles = heads.group * heads.query_tiles;
    const int key_head = attention::own_key_head(params.backward, head);
    // Until lse and delta of so many of the group's query tiles are there.
    const auto await_statistics = [&](int tiles) {
#pragma unroll 1
      while (static_cast<int>(statistics_at.fills - first_statistics) < min(tiles, query_tiles)) {
        stages.statistics.wait_full(statistics_at);
        stages.statistics.release(statistics_at.stage());
        statistics_at.advance();
      }
    };
    // A key tile and a pass after the other, the key tiles first.
    int tile = 0;
    int pass = 0;
    const auto advance = [&] {
      if (++tile < heads.key_tiles) return;
      tile = 0;
      ++pass;
    };
#pragma unroll 1
    for (; pass < heads.passes && tile < heads.key_tiles; advance()) {
      const attention::TilePlace place{tile, head, batch};
      const auto walk = heads.walk(place, pass);
      if (walk.steps() == 0) continue;
      const auto load_keys = [&] {
        const typename Shapes::KeyPosition at{number};
        for (int consumer = 0; consumer < kBackwardConsumers; ++consumer) {
          const auto keys = stages.keys_of(consumer);
          keys.await_empty(at);
          if (consumer == 0) stages.places.put(number % Shapes::kPlaces, place, pass);
          keys.announce(at, KeyTile::kBytes);
          const int row = walk.first_key + half_of<Config>(consumer, tile) * Shapes::kConsumerKeys;
          load_tile<KeyTile>(stages.key_tile(consumer, at.stage()), params.k, keys.full(at.stage()),
                             ptx::kEvictFirst, row, key_head,
                             attention::own_batch(batch, attention.k.batches));
          // Consumers read it from there when they need it.
          ptx::tma_prefetch(params.v, 0, row, key_head,
                            attention::own_batch(batch, attention.v.batches));
          if (walk.continues)
            ptx::bulk_prefetch(HeadPartial<Config>(params, tile, consumer).sums,
                               HeadPartial<Config>::kBytes);
        }
      };
      load_queries<Config>(
          params.q, params.dout, params.backward,
          static_cast<const BackwardStages<Shapes>&>(stages), walk, query_at, dout_at, load_keys,
          [&](int n) {
            await_statistics(walk.heads > 1
                                 ? query_tiles
                                 : (walk.first_head - head * heads.group) * heads.query_tiles +
                                       walk.query_tiles.begin + n + 1);
          });
      ++number;
    }
    await_statistics(query_tiles);
  });
  // There are no more.
  const typename Shapes::KeyPosition at{number};
  for (int consumer = 0; consumer < kBackwardConsumers; ++consumer) {
    stages.keys_of(consumer).await_empty(at);
    if (consumer == 0) stages.places.put(number % Shapes::kPlaces, {kNoTile, 0, 0});
    stages.keys_of(consumer).announce(at, 0);
  }
}

// Threads: a whole warp, of kStatisticsWarps.
template <class Config>
__device__ __forceinline__ void make_head_statistics(const Sm90HeadBackwardParams& params,
                                                     const HeadBackwardStages<Config>& stages,
                                                     int warp) {
  using Shapes = HeadBackwardShapes<Config>;
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;
  const HeadWalk<Config> heads(attention);
  const attention::VisibleRange<Config> range(attention);
  typename Shapes::StatisticsPosition at;
  int turn = warp;  // at the passes of a tile, whose number three does not divide
  heads.for_each([&](int batch, int head_k) {
#pragma unroll 1
    for (int head = head_k * heads.group; head < (head_k + 1) * heads.group; ++head)
#pragma unroll 1
      for (int tile = 0; tile < heads.query_tiles; ++tile) {
        const int first_query = tile * Config::kTileQ;
        stages.statistics.await_empty(at);
        make_statistics<Config, Config::kTileQ, Shapes::kChunksAhead>(
            backward, batch, head, first_query, turn, [](int, float, float) {});
        turn = turn == kStatisticsWarps - 1 ? 0 : turn + 1;
        if (range.key_tiles(first_query).empty())
          clear_rows<Config>(backward.dq, {tile, head, batch}, Config::kTileQ, attention.seqlen_q,
                             warp, kStatisticsWarps);
        ptx::fence_async_proxy_global();  // the copy engine reads what threads have written
        stages.statistics.finish_fill(at);
        at.advance();
      }
    // Consumers come to no tile that sees nothing, or that nothing sees.
#pragma unroll 1
    for (int tile = 0; tile < heads.key_tiles; ++tile) {
      if (!range.query_tiles(tile * Config::kTileK).empty()) continue;
      const auto clear = [&](const TensorView& gradient) {
        clear_rows<Config>(gradient, {tile, head_k, batch}, Config::kTileK, attention.seqlen_k,
                           warp, kStatisticsWarps);
      };
      clear(backward.dk);
      clear(backward.dv);
    }
  });
}

// Contains all gradients of a CTA. Threads: whole warps, each its own of `warps`.
template <class Config>
__device__ __forceinline__ void contain_heads(const BackwardParams& backward, int warp, int warps) {
  const AttentionParams& attention = backward.attention;
  const HeadWalk<Config> heads(attention);
  heads.for_each([&](int batch, int head_k) {
    attention::contain_dk_dv<Config>(backward, batch, head_k, {warp, attention.seqlen_k}, warps);
#pragma unroll 1
    for (int head = head_k * heads.group; head < (head_k + 1) * heads.group; ++head)
#pragma unroll 1
      for (int tile = 0; tile < heads.query_tiles; ++tile) {
        const int first_query = tile * Config::kTileQ;
        attention::contain_dq<Config>(backward, batch, head, first_query,
                                      {first_query + warp, first_query + Config::kTileQ}, warps);
      }
  });
}

// Returns whether dk and dv are finite, as far as that matters. Threads: a whole warpgroup.
template <class Config>
__device__ __forceinline__ bool consume_head_backward(const Sm90HeadBackwardParams& params,
                                                      const HeadBackwardStages<Config>& stages,
                                                      int consumer) {
  using Shapes = HeadBackwardShapes<Config>;
  using Element = typename Config::Element;
  using QueryTile = typename Shapes::QueryTile;
  using KeyTile = typename Shapes::KeyTile;
  using DscoresTile = typename Shapes::DscoresTile;
  using Scores = typename Shapes::Scores;
  using Walk = typename HeadWalk<Config>::Walk;
  using Step = typename Walk::Step;
  const BackwardParams& backward = params.backward;
  const AttentionParams& attention = backward.attention;

  const HeadWalk<Config> heads(attention);
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32);
  const auto consumer_row = [&](int key_tile) {
    return half_of<Config>(consumer, key_tile) * Shapes::kConsumerKeys;
  };

  typename Shapes::Gradient dk;
  typename Shapes::Gradient dv;
  Scores scores;
  Scores dprobs;
  // The warp's rows of k and of v of the key tile.
  tile::RegisterOperand<1, Shapes::kHeadDimSteps> k_rows;
  tile::RegisterOperand<1, Shapes::kHeadDimSteps> v_rows;
  // Dropout takes registers.
  constexpr int kAhead = Scores::kColumnTiles / (Config::kDropout ? 4 : 2);
  ColumnStatistics<Scores, kAhead> lse;
  ColumnStatistics<Scores, kAhead> delta;
  unsigned number = 0;  // of the key tile
  unsigned sent = 0;    // dscores, so far
  tile::RingCursor<Config::kQueryStages> query_at;
  tile::RingCursor<Config::kDoutStages> dout_at;
  const auto keys = stages.keys_of(consumer);
  const auto dscores = stages.dscores_of(consumer);
  const unsigned dscores_tile = stages.dscores_tile(consumer);
  const auto await_dscores = [&] {  // until those sent have been read
    dscores.await_empty(typename Shapes::DscoresPosition{sent});
  };
  const auto keys_at = [&] { return typename Shapes::KeyPosition{number}; };

  // A tile in a stage, as wgmma finds it.
  const auto rows_of = [&](auto tile_type, int offset, int stage) {
    using Tile = decltype(tile_type);
    return tile::RowDescriptor<Tile>(stages.shared + offset + stage * Tile::kBytes, 0);
  };
  const auto columns_of = [&](auto tile_type, int offset, int stage) {
    using Tile = decltype(tile_type);
    return tile::ColumnDescriptor<Tile>(stages.shared + offset + stage * Tile::kBytes);
  };
  const auto start_scores = [&] {
    tile::start_register_product<Element>(
        scores, k_rows, rows_of(QueryTile(), Shapes::kQueryOffset, query_at.stage()), 0,
        /*onto=*/false);
  };
  const auto start_dprobs = [&] {
    tile::start_register_product<Element>(
        dprobs, v_rows, rows_of(QueryTile(), Shapes::kDoutOffset, dout_at.stage()), 0,
        /*onto=*/false);
  };
  const auto statistics = [&](int offset, int stage) {
    return reinterpret_cast<const float*>(stages.memory + offset +
                                          stage * Shapes::kStatisticsBytes);
  };
  // The step that is worked on: of which key tile's walk, and how many are left of that.
  struct Work {
    attention::TilePlace place;
    attention::Range query_tiles;  // of the walk
    Step step;
    int remaining;
    bool begins;     // the step the walk
    bool continues;  // dk and dv of a pass before
  };
  Work work{};
  const auto begin_walk = [&] {
    work.place = stages.places.get(number % Shapes::kPlaces);
    if (work.place.tile == kNoTile) return;
    const Walk walk = heads.walk(work.place, stages.places.pass(number % Shapes::kPlaces));
    work.query_tiles = walk.query_tiles;
    const bool skips = skips_first<Config>(attention, walk, consumer);
    work.remaining = walk.steps() - skips;
    work.step = walk.first();
    work.step.query_tile += skips;
    work.begins = true;
    work.continues = walk.continues;
  };
  const auto advance_walk = [&] {
    if (++work.step.query_tile == work.query_tiles.end) {
      work.step.query_tile = work.query_tiles.begin;
      ++work.step.head;
    }
    work.begins = false;
  };
  const auto tile_of = [&] {
    const int first_key = work.place.tile * Config::kTileK;
    return ScoreTile{work.place.batch, work.step.head, work.step.query_tile * Config::kTileQ,
                     first_key, first_key + consumer_row(work.place.tile) + warp * 16};
  };
  // v of the next key tile, asked for when v of this one has been used for the last time.
  const auto ask_values = [&](unsigned next) {
    keys.wait_full(typename Shapes::KeyPosition{next});
    const attention::TilePlace place = stages.places.get(next % Shapes::kPlaces);
    if (place.tile == kNoTile) return;
    const int first_row = place.tile * Config::kTileK + consumer_row(place.tile) + warp * 16;
    v_rows.template read_rows_of<Config::kHeadDim>(
        attention::head_address(attention.v, place.batch,
                                attention::own_key_head(backward, place.head)) +
            static_cast<long long>(first_row) * attention.v.row_stride,
        attention.v.row_stride, attention.seqlen_k - first_row);
  };
  // A step that this consumer skips: what the producer waits for.
  const auto skip_operands = [&] {
    stages.query.wait_full(query_at);
    stages.query.release(query_at.stage());
    query_at.advance();
    stages.dout.wait_full(dout_at);
    stages.dout.release(dout_at.stage());
    dout_at.advance();
  };
  const auto next_skips = [&] {
    if constexpr (!Config::kWindowed) return false;
    const attention::TilePlace place = stages.places.get(number % Shapes::kPlaces);
    return place.tile != kNoTile &&
           skips_first<Config>(attention,
                               heads.walk(place, stages.places.pass(number % Shapes::kPlaces)),
                               consumer);
  };
  // What the first products of the step that comes read. crosses: it is of the next key tile.
  // Behind the last one, products are of what lies there, and nobody looks at them.
  const auto has_next = [&] { return stages.places.get(number % Shapes::kPlaces).tile != kNoTile; };
  const auto await_scores = [&](bool crosses) {
    if (crosses) {
      if (!has_next()) return;
      k_rows.template read_rows<KeyTile>(stages.key_tile(consumer, keys_at().stage()), warp * 16);
    }
    stages.query.wait_full(query_at);
  };
  const auto await_dprobs = [&](bool crosses) {
    if (crosses && !has_next()) return;
    stages.dout.wait_full(dout_at);
  };
  // dk and dv leave by way of the places of dscores, which is free between the last step of a key
  // tile and the first one of the next, and of k.
  const auto leads = [] { return ptx::reread_thread() % 128 == 0; };
  const auto await_consumer = [&] { ptx::barrier_sync(Shapes::kConsumerBarrier + consumer, 128); };
  static_assert(DscoresTile::kBytes == KeyTile::kBytes, "dk takes the place of dscores");
  bool finite = true;
  const auto send_key_gradients = [&] {
    if constexpr (Config::kWindowed) finite &= dk.is_finite() && dv.is_finite();
    dk.scale(attention.softmax_scale);
    if constexpr (Config::kDropout) dv.scale(attention.dropout_scale);
    await_dscores();  // the summer has read them all, and k
    const unsigned staged_dv = stages.key_tile(consumer, (number - 1) % Shapes::kKeyStages);
    tile::store_accumulator<Element, KeyTile, 16, 1>(dscores_tile, 0, dk, warp * 16, 0);
    tile::store_accumulator<Element, KeyTile, 16, 1>(staged_dv, 0, dv, warp * 16, 0);
    ptx::fence_async_proxy();
    await_consumer();
    if (leads()) {
      const int row = work.place.tile * Config::kTileK + consumer_row(work.place.tile);
      const auto store = [&](const TensorMap& map, unsigned staged, int batches) {
        ptx::tma_store(map, staged, 0, row, work.place.head,
                       attention::own_batch(work.place.batch, batches));
      };
      store(params.dk, dscores_tile, backward.dk.batches);
      store(params.dv, staged_dv, backward.dv.batches);
      ptx::bulk_commit();
    }
  };
  const auto partial = [&] {
    return HeadPartial<Config>(params, work.place.tile, consumer).of_thread();
  };
  const auto end_gradients = [&] {
    if constexpr (Config::kHeadPasses > 1) {
      // Worked out anew: there is no register for it.
      if (heads.walk(work.place, stages.places.pass((number - 1) % Shapes::kPlaces)).passes_on) {
        partial().store(dk, dv);
        return;
      }
    }
    send_key_gradients();
  };
  const auto begin_gradients = [&] {
    if constexpr (Config::kHeadPasses > 1)
      if (work.place.tile != kNoTile && work.continues) partial().load(dk, dv);
  };
  const auto load_lse = [&] { lse.load(statistics(Shapes::kLseOffset, query_at.stage())); };

  ask_values(0);
  if (next_skips()) skip_operands();
  await_scores(true);
  start_scores();
  await_dprobs(true);
  load_lse();
  start_dprobs();
  ptx::wgmma_wait<1>();  // scores
  begin_walk();
  begin_gradients();
#pragma unroll 1
  while (work.place.tile != kNoTile) {
    KeptBits<Config, Scores> dropout;
    typename Shapes::Operand rounded_probs;
    typename Shapes::Operand rounded_dscores;
    make_probs<Config>(scores, attention, tile_of(), lse);
    dropout.draw(attention, work.place.batch, work.step.head, tile_of().layout());
    delta.load(statistics(Shapes::kDeltaOffset, dout_at.stage()));
    ptx::wgmma_wait<0>();  // dprobs
    round_probs<Config>(scores, dropout, rounded_probs);
    const attention::ScoreTransform<Config> transform(attention, work.place.batch, work.step.head);
#pragma unroll
    for (int n = 0; n < Scores::kColumnTiles; ++n)
      make_dscores<Config>(dprobs, n, scores.values[0][n], dropout, transform, tile_of().layout(),
                           attention.dropout_scale, delta.take(n),
                           statistics(Shapes::kLseOffset, query_at.stage()));
    rounded_dscores.template pack<Element>(dprobs);
    const bool begins = work.begins;
    if (begins) {
      if (leads()) {
        ptx::bulk_wait_read<0>();  // dk and dv of the key tile before
        // Where they have not gone by way of dscores and k, these may still be read.
        if constexpr (Config::kHeadPasses > 1) await_dscores();
        if (number > 0) keys.release((number - 1) % Shapes::kKeyStages);
      }
      await_consumer();
    }
    if (work.remaining == 1) ask_values(number + 1);  // k of it comes where that has been let go of
    await_dscores();
    tile::store_transposed<DscoresTile>(dscores_tile, rounded_dscores, warp);
    tile::start_register_product<Element>(
        dv, rounded_probs, columns_of(QueryTile(), Shapes::kDoutOffset, dout_at.stage()), 0,
        !begins || work.continues);
    tile::start_register_product<Element>(
        dk, rounded_dscores, columns_of(QueryTile(), Shapes::kQueryOffset, query_at.stage()), 0,
        !begins || work.continues);
    ptx::fence_async_proxy();  // behind the products' start, which takes as long as the stores
    dscores.finish_fill(typename Shapes::DscoresPosition{sent++});
    ptx::wgmma_wait<1>();  // dv
    // Every thread has read lse and delta for itself.
    stages.dout.release(dout_at.stage());
    dout_at.advance();
    const int query_stage = query_at.stage();
    query_at.advance();
    const bool crosses = --work.remaining == 0;
    if (crosses) ++number;
    if (crosses && next_skips()) skip_operands();
    await_scores(crosses);
    start_scores();
    load_lse();
    ptx::wgmma_wait<1>();  // dk
    stages.query.release(query_stage);
    await_dprobs(crosses);
    start_dprobs();
    ptx::wgmma_wait<1>();  // scores: over a branch ptxas lets no more than one product run (C7514)
    if (crosses) {
      end_gradients();
      begin_walk();
      begin_gradients();
    } else {
      advance_walk();
    }
  }
  ptx::wgmma_wait<0>();
  if (leads()) ptx::bulk_wait();  // shared memory ends with the CTA
  return finite;
}

// Adds dq up, and writes it. Returns whether it is finite, as far as that matters. Threads: a whole
// warpgroup.
template <class Config>
__device__ __forceinline__ bool sum_query_gradients(const Sm90HeadBackwardParams& params,
                                                    const HeadBackwardStages<Config>& stages) {
  using Shapes = HeadBackwardShapes<Config>;
  using Element = typename Config::Element;
  using KeyTile = typename Shapes::KeyTile;
  using DscoresTile = typename Shapes::DscoresTile;
  using Walk = typename HeadWalk<Config>::Walk;
  const AttentionParams& attention = params.backward.attention;
  const HeadWalk<Config> heads(attention);
  const attention::VisibleRange<Config> range(attention);
  const int warp = ptx::uniform(static_cast<int>(threadIdx.x) % 128 / 32);
  typename Shapes::Gradient dq;
  bool finite = true;
  typename Shapes::DscoresPosition dscores_at[kBackwardConsumers];
#pragma unroll 1
  for (unsigned number = 0;; ++number) {  // of the key tile
    const typename Shapes::KeyPosition keys_at{number};
    for (int consumer = 0; consumer < kBackwardConsumers; ++consumer)
      stages.keys_of(consumer).wait_full(keys_at);
    const attention::TilePlace place = stages.places.get(number % Shapes::kPlaces);
    if (place.tile == kNoTile) break;
    const Walk walk = heads.walk(place, stages.places.pass(number % Shapes::kPlaces));
    typename Walk::Step step = walk.first();
    const bool skips[] = {skips_first<Config>(attention, walk, 0),
                          skips_first<Config>(attention, walk, 1)};
#pragma unroll 1
    for (int remaining = walk.steps(); remaining > 0; --remaining) {
      const attention::Range key_tiles = range.key_tiles(step.query_tile * Config::kTileQ);
      const typename Shapes::Sums sums(
          stages.memory + Shapes::kSumsOffset +
          ((step.head - walk.first_head) * heads.query_tiles + step.query_tile - walk.first_tile) *
              Shapes::Sums::kBytes);
      bool onto = place.tile != key_tiles.begin;
      if (onto) sums.load(dq);
#pragma unroll
      for (int consumer = 0; consumer < kBackwardConsumers; ++consumer) {
        if (skips[consumer] && remaining == walk.steps()) continue;
        const auto dscores = stages.dscores_of(consumer);
        dscores.wait_full(dscores_at[consumer]);
        dscores_at[consumer].advance();
        tile::start_shared_product<Element, Shapes::kKeySteps>(
            dq, tile::RowDescriptor<DscoresTile>(stages.dscores_tile(consumer), 0), 0,
            tile::ColumnDescriptor<KeyTile>(stages.key_tile(consumer, keys_at.stage())), 0, onto);
        ptx::wgmma_wait<0>();
        dscores.release(0);
        onto = true;
      }
      if (place.tile != key_tiles.end - 1) {
        sums.store(dq);
      } else {
        store_query_gradient<Config>(params.backward, place.batch, step.head,
                                     step.query_tile * Config::kTileQ + warp * 16, dq);
        if constexpr (Config::kWindowed) finite &= dq.is_finite();
      }
      walk.advance(step);
    }
  }
  return finite;
}

template <class Config>
__device__ __forceinline__ void head_backward(const Sm90HeadBackwardParams& params,
                                              unsigned char* shared) {
  using Shapes = HeadBackwardShapes<Config>;
  const HeadBackwardStages<Config> stages(shared);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(params.q);
    ptx::prefetch_tensor_map(params.k);
    ptx::prefetch_tensor_map(params.v);
    ptx::prefetch_tensor_map(params.dout);
    stages.init();
  }
  __syncthreads();  // the rings are there
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 0) {
    ptx::release_registers<Shapes::kProducerRegisters>();
    const int warp = ptx::uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp > 0) {
      make_head_statistics<Config>(params, stages, warp - 1);
    } else if (ptx::elect_lane()) {
      produce_head_backward<Config>(params, stages);
    }
  } else {
    const bool is_consumer = warpgroup <= kBackwardConsumers;
    bool finite;
    if (is_consumer) {
      ptx::claim_registers<Shapes::kConsumerRegisters>();
      finite = consume_head_backward<Config>(params, stages, warpgroup - 1);
    } else {
      ptx::release_registers<Shapes::kSummerRegisters>();
      finite = sum_query_gradients<Config>(params, stages);
    }
    if constexpr (Config::kWindowed) {
      ptx::fence_async_proxy_global();  // what the copy engine has written is read back
      // All come to one place, as synccheck asks. The summer has no registers to contain with.
      const bool spoilt = ptx::barrier_any(Shapes::kEndBarrier, Shapes::kEndThreads, !finite);
      if (spoilt && is_consumer)
        contain_heads<Config>(params.backward, static_cast<int>(threadIdx.x) / 32 - 4,
                              kBackwardConsumers * 4);
    }
  }
}

}  // namespace jfa::sm90
