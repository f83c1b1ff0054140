// Shapes and shared memory of the backward of whole heads (sm90/head_backward.cuh): what it holds,
// where, the rings by which its roles hand it over, and which heads a CTA takes.
#pragma once

#include <attention/head_address.cuh>
#include <attention/visible_range.cuh>
#include <params/backward_params.h>
#include <ptx/mbarrier.cuh>
#include <sm90/backward_steps.cuh>
#include <sm90/key_order.cuh>
#include <sm90/query_statistics.cuh>
#include <sm90/tile_places.cuh>
#include <tile/fragment.cuh>
#include <tile/ring.cuh>
#include <tile/shared_sums.cuh>
#include <tile/shared_tile.cuh>

namespace jfa::sm90 {

template <class Config>
struct HeadBackwardShapes {
  static_assert(Config::kTileQ == 64, "dq is a product of 64 rows");
  static_assert(Config::kTileK == 64 * kBackwardConsumers, "a consumer owns 64 keys");
  static_assert(Config::kQueryStages > 1 && Config::kDoutStages > 1,
                "a consumer starts the next step before it lets go of this one");
  static_assert(!Config::kWindowed || Config::kQueryStages > 2,
                "and is a step ahead of the other where it skips one");
  static constexpr int kConsumerBarrier = 1;  // and 2
  static constexpr int kEndBarrier = 3;
  static constexpr int kEndThreads = (kBackwardConsumers + 1) * 128;
  // 512 in all. The warps that read rows keep many loads on their way, for which dropout leaves
  // none.
  static constexpr int kConsumerRegisters = Config::kDropout ? 200 : 192;
  static constexpr int kSummerRegisters = Config::kDropout ? 72 : 64;
  static constexpr int kProducerRegisters = Config::kDropout ? 40 : 64;
  static constexpr int kChunksAhead = Config::kDropout ? 2 : 4;
  static constexpr int kConsumerKeys = 64;
  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kQuerySteps = Config::kTileQ / 16;
  static constexpr int kKeySteps = kConsumerKeys / 16;

  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<kConsumerKeys, Config::kHeadDim>;  // of a consumer
  using DscoresTile = tile::SharedTile<Config::kTileQ, kConsumerKeys>;
  using Scores = tile::Accumulator<1, kQuerySteps>;
  using Operand = tile::RegisterOperand<1, kQuerySteps>;
  using Gradient = tile::Accumulator<1, kHeadDimSteps>;
  using Sums = tile::SharedSums<Gradient>;

  static constexpr int kKeyStages = 2;
  static constexpr int kStatisticsStages = 8;
  using QueryRing = tile::Ring<Config::kQueryStages>;
  using DoutRing = tile::Ring<Config::kDoutStages>;
  using KeyRing = tile::Ring<kKeyStages>;  // of each consumer
  using DscoresRing = tile::Ring<1>;       // of each consumer
  using StatisticsRing = tile::Ring<kStatisticsStages>;
  using QueryPosition = tile::RingPosition<Config::kQueryStages>;
  using DoutPosition = tile::RingPosition<Config::kDoutStages>;
  using KeyPosition = tile::RingPosition<kKeyStages>;
  using DscoresPosition = tile::RingPosition<1>;
  using StatisticsPosition = tile::RingPosition<kStatisticsStages>;
  static constexpr int kStatisticsBytes = Config::kTileQ * 4;
  // A place is written when consumer 0 has let go of k of the key tile two before, and consumer 1
  // of that three before, whose places they have read by then.
  static constexpr int kPlaces = 4;

  static constexpr int kKeyOffset = 0;
  static constexpr int kQueryOffset =
      kKeyOffset + kBackwardConsumers * kKeyStages * KeyTile::kBytes;
  static constexpr int kDoutOffset = kQueryOffset + Config::kQueryStages * QueryTile::kBytes;
  static constexpr int kDscoresOffset = kDoutOffset + Config::kDoutStages * QueryTile::kBytes;
  static constexpr int kSumsOffset = kDscoresOffset + kBackwardConsumers * DscoresTile::kBytes;
  static constexpr int kLseOffset = kSumsOffset + Config::kHeadTiles * Sums::kBytes;
  static constexpr int kDeltaOffset = kLseOffset + Config::kQueryStages * kStatisticsBytes;
  static constexpr int kPlaceOffset = kDeltaOffset + Config::kDoutStages * kStatisticsBytes;
  static constexpr int kQueryRingOffset = kPlaceOffset + kPlaces * TilePlaces::kSlotBytes;
  static constexpr int kDoutRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kKeyRingOffset = kDoutRingOffset + DoutRing::kBytes;
  static constexpr int kDscoresRingOffset = kKeyRingOffset + kBackwardConsumers * KeyRing::kBytes;
  static constexpr int kStatisticsRingOffset =
      kDscoresRingOffset + kBackwardConsumers * DscoresRing::kBytes;
  static constexpr int kSharedBytes = kStatisticsRingOffset + StatisticsRing::kBytes;
};

// What all roles see of the shared memory.
template <class Config>
struct HeadBackwardStages : BackwardStages<HeadBackwardShapes<Config>> {
  using Shapes = HeadBackwardShapes<Config>;
  unsigned char* memory;
  TilePlaces places;
  typename Shapes::StatisticsRing statistics;

  __device__ __forceinline__ explicit HeadBackwardStages(unsigned char* shared_memory)
      : BackwardStages<Shapes>(tile::shared_address(shared_memory)),
        memory(shared_memory),
        places(shared_memory + Shapes::kPlaceOffset),
        statistics{this->shared + Shapes::kStatisticsRingOffset} {}

  // Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init() const {
    this->query.init(kBackwardConsumers * 128);
    this->dout.init(kBackwardConsumers * 128);
    for (int consumer = 0; consumer < kBackwardConsumers; ++consumer) {
      keys_of(consumer).init(1);
      dscores_of(consumer).init(/*users=*/128, /*fillers=*/128);
    }
    statistics.init(1, /*fillers=*/kStatisticsWarps * 32);
    ptx::mbarrier_init_fence();
  }

  // BackwardStages::keys is consumer 0's.
  __device__ __forceinline__ typename Shapes::KeyRing keys_of(int consumer) const {
    return {this->shared + Shapes::kKeyRingOffset + consumer * Shapes::KeyRing::kBytes};
  }
  __device__ __forceinline__ typename Shapes::DscoresRing dscores_of(int consumer) const {
    return {this->shared + Shapes::kDscoresRingOffset + consumer * Shapes::DscoresRing::kBytes};
  }
  // Where a consumer's dscores lie.
  __device__ __forceinline__ unsigned dscores_tile(int consumer) const {
    return this->shared + Shapes::kDscoresOffset + consumer * Shapes::DscoresTile::kBytes;
  }
  // Where a consumer's rows of k lie.
  __device__ __forceinline__ unsigned key_tile(int consumer, int stage) const {
    return this->shared + Shapes::kKeyOffset +
           (consumer * Shapes::kKeyStages + stage) * Shapes::KeyTile::kBytes;
  }
};

// The walk of a CTA along a key tile, of one pass: its query tiles of that pass, for each query
// head of the group or, where there are several passes, for one.
template <class Config>
struct HeadTileWalk {
  attention::TilePlace place;  // head is the key head
  int first_key;
  attention::Range query_tiles;
  int first_head;
  int heads = 1;
  int first_tile = 0;      // of the pass
  bool continues = false;  // dk and dv of a pass before
  bool passes_on = false;  // them to a later one

  using Step = typename BackwardWalk<Config, false>::Step;

  __device__ __forceinline__ int steps() const {
    return query_tiles.empty() ? 0 : heads * (query_tiles.end - query_tiles.begin);
  }
  __device__ __forceinline__ Step first() const { return {first_head, query_tiles.begin}; }
  __device__ __forceinline__ void advance(Step& step) const {
    if (++step.query_tile < query_tiles.end) return;
    step.query_tile = query_tiles.begin;
    ++step.head;
  }
};

// Whether a consumer skips the first query tile of a walk, which does not see its half. Not where a
// tile comes once for each head of a group, nor the only step, which begins dk and dv.
template <class Config, class Walk>
__device__ __forceinline__ bool skips_first(const AttentionParams& attention, const Walk& walk,
                                            int consumer) {
  if constexpr (!Config::kWindowed) return false;
  const int half = half_of<Config>(consumer, walk.place.tile);
  const int first_seeing = attention::VisibleRange<Config>(attention).first_seeing(
      walk.first_key + half * HeadBackwardShapes<Config>::kConsumerKeys);
  return attention.heads == attention.heads_k && walk.steps() > 1 &&
         first_seeing >= (walk.query_tiles.begin + 1) * Config::kTileQ;
}

// The key heads of a CTA, and what there is of each. Where dq of all its queries does not fit, they
// come in passes, and dk and dv of a key tile go on from one pass to the next.
template <class Config>
struct HeadWalk {
  using Walk = HeadTileWalk<Config>;
  const AttentionParams& attention;
  int group;
  int query_tiles;  // of a query head
  int key_tiles;
  int head_passes = 1;  // of a query head
  int passes = 1;       // of the group

  __device__ __forceinline__ explicit HeadWalk(const AttentionParams& params)
      : attention(params),
        group(params.heads / params.heads_k),
        query_tiles((params.seqlen_q + Config::kTileQ - 1) / Config::kTileQ),
        key_tiles((params.seqlen_k + Config::kTileK - 1) / Config::kTileK) {
    if constexpr (Config::kHeadPasses > 1) {
      if (group * query_tiles > Config::kHeadTiles) {
        head_passes = (query_tiles + Config::kHeadTiles - 1) / Config::kHeadTiles;
        passes = group * head_passes;
      }
    }
  }

  __device__ __forceinline__ Walk walk(const attention::TilePlace& place, int pass) const {
    Walk walk;
    walk.place = place;
    walk.first_key = place.tile * Config::kTileK;
    walk.query_tiles = attention::VisibleRange<Config>(attention).query_tiles(walk.first_key);
    walk.first_head = place.head * group;
    walk.heads = group;
    if constexpr (Config::kHeadPasses > 1) {
      if (passes > 1) {
        const attention::Range all = walk.query_tiles;
        const int head = pass / head_passes;
        walk.first_head += head;
        walk.heads = 1;
        walk.first_tile = (pass - head * head_passes) * Config::kHeadTiles;
        const int end_tile = walk.first_tile + Config::kHeadTiles;
        walk.query_tiles = {max(all.begin, walk.first_tile), min(all.end, end_tile)};
        walk.continues = head > 0 || all.begin < walk.first_tile;
        walk.passes_on = head + 1 < group || all.end > end_tile;
      }
    }
    return walk;
  }

  // visit(batch, key head). Threads: any.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    const unsigned heads = attention.batch * attention.heads_k;
#pragma unroll 1
    for (unsigned head = blockIdx.x; head < heads; head += gridDim.x)
      visit(static_cast<int>(head / attention.heads_k), static_cast<int>(head % attention.heads_k));
  }
};

}  // namespace jfa::sm90
