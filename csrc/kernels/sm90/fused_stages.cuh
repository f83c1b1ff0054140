// Shapes and shared memory of the fused backward (sm90/backward.cuh): what it holds, where, and the
// rings by which its roles hand it over.
#pragma once

#include <sm90/backward_steps.cuh>
#include <sm90/row_service.cuh>
#include <sm90/tile_places.cuh>

namespace jfa::sm90 {

template <class Config>
struct BackwardShapes {
  static_assert(Config::kTileK == 64 * kBackwardConsumers, "a consumer owns 64 keys");
  // Of dq, a consumer computes half of the columns of 64 queries, or all columns of half of 128.
  static_assert(Config::kTileQ == 64 || Config::kTileQ == 128, "dq is a product of 64 rows");
  static_assert(Config::kQueryStages > 1 && Config::kDoutStages > 1,
                "in its turn a consumer waits for the next step, while the other needs this one");
  static constexpr bool kSplitsRows = Config::kTileQ == 128;
  // Scores of the next step are started before dq is staged where registers hold both beside dk and
  // dv; behind dq, they wait for its stores.
  static constexpr bool kScoresFirst = Config::kHeadDim <= 64;
  static_assert(!(Config::kServesRows && Config::kDeterministic), "the warps are taken");
  // Whether the warps beside the producer do something.
  static constexpr bool kIdleWarpsWork = Config::kServesRows || Config::kDeterministic;
  static constexpr int kConsumerRegisters = kIdleWarpsWork ? 232 : kBackwardConsumerRegisters;
  static constexpr int kProducerRegisters = kIdleWarpsWork ? 40 : kBackwardProducerRegisters;
  static constexpr int kHeadDimSteps = (Config::kHeadDim + 15) / 16;
  static constexpr int kQuerySteps = Config::kTileQ / 16;
  static constexpr int kKeySteps = Config::kTileK / 16;

  // Where columns are split, a consumer's start in a panel, or halfway through it.
  static constexpr int kSplitSteps = Config::kHeadDim > 64 ? 4 : 2;
  static __device__ constexpr int query_gradient_steps(int consumer) {
    if (kSplitsRows) return kHeadDimSteps;
    return consumer == 0 ? (kHeadDimSteps < kSplitSteps ? kHeadDimSteps : kSplitSteps)
                         : (kHeadDimSteps > kSplitSteps ? kHeadDimSteps - kSplitSteps : 0);
  }
  // Of dq: the second consumer has none where the first one's steps are all.
  static constexpr int kParts() { return 1 + (query_gradient_steps(1) > 0); }
  // Where a consumer's part of dq starts, in floats.
  static __device__ constexpr int query_gradient_offset(int consumer) {
    return consumer * 64 * 16 * (kSplitsRows ? kHeadDimSteps : kSplitSteps);
  }
  // Where the sums of 16 rows by 16 columns of a tile's dq start, in floats.
  static __device__ __forceinline__ int query_gradient_place(int row_block, int step) {
    const int consumer = kSplitsRows ? row_block / 4 : step >= kSplitSteps;
    const int steps = consumer == 0 ? query_gradient_steps(0) : query_gradient_steps(1);
    const int part_step = kSplitsRows ? step : step - consumer * kSplitSteps;
    return query_gradient_offset(consumer) + (row_block % 4 * steps + part_step) * 256;
  }
  static constexpr int kSplitBytes =
      Config::kHeadDim > 64 ? Config::kTileK * tile::kPanelRowBytes : 64;

  using QueryTile = tile::SharedTile<Config::kTileQ, Config::kHeadDim>;
  using KeyTile = tile::SharedTile<Config::kTileK, Config::kHeadDim>;
  using DscoresTile = tile::SharedTile<Config::kTileQ, Config::kTileK>;
  using Scores = tile::Accumulator<1, kQuerySteps>;
  using Probs = tile::RegisterOperand<1, kQuerySteps>;
  using KeyGradient = tile::Accumulator<1, kHeadDimSteps>;
  template <int kConsumer>
  using QueryGradient =
      tile::Accumulator<1,
                        query_gradient_steps(kConsumer) == 0 ? 1 : query_gradient_steps(kConsumer)>;

  using QueryRing = tile::Ring<Config::kQueryStages>;
  using DoutRing = tile::Ring<Config::kDoutStages>;
  using KeyRing = tile::Ring<1>;
  using ValueRing = tile::Ring<1>;  // of its own: scores need not wait for v
  using ServiceRing = tile::Ring<2>;
  using SumsRing = tile::Ring<1>;  // one for each consumer
  using KeyPosition = tile::RingPosition<1>;
  using ServicePosition = tile::RingPosition<2>;
  using SumsPosition = tile::RingPosition<1>;
  // The service warps may be a key tile behind the consumers.
  static constexpr int kPlaces = 4;
  using QueryPosition = tile::RingPosition<Config::kQueryStages>;
  using DoutPosition = tile::RingPosition<Config::kDoutStages>;
  static constexpr int kStatisticsBytes = Config::kTileQ * 4;

  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kQueryOffset = kValueOffset + KeyTile::kBytes;
  static constexpr int kDoutOffset = kQueryOffset + Config::kQueryStages * QueryTile::kBytes;
  static constexpr int kDscoresOffset = kDoutOffset + Config::kDoutStages * QueryTile::kBytes;
  static constexpr int kQueryGradientOffset = kDscoresOffset + 2 * DscoresTile::kBytes;
  static constexpr int kQueryGradientBytes =
      Config::kTileQ * 16 * kHeadDimSteps * static_cast<int>(sizeof(float));
  static constexpr int kServiceOffset = kQueryGradientOffset + kQueryGradientBytes;
  static_assert(kServiceOffset % 1024 == 0, "a swizzle atom's size");
  static constexpr int kLseOffset = kServiceOffset + ServiceStaging::kBytes;
  static constexpr int kDeltaOffset = kLseOffset + Config::kQueryStages * kStatisticsBytes;
  static constexpr int kPlaceOffset = kDeltaOffset + Config::kDoutStages * kStatisticsBytes;
  static constexpr int kQueryRingOffset = kPlaceOffset + kPlaces * TilePlaces::kSlotBytes;
  static constexpr int kDoutRingOffset = kQueryRingOffset + QueryRing::kBytes;
  static constexpr int kKeyRingOffset = kDoutRingOffset + DoutRing::kBytes;
  static constexpr int kValueRingOffset = kKeyRingOffset + KeyRing::kBytes;
  static constexpr int kServiceRingOffset = kValueRingOffset + ValueRing::kBytes;
  static constexpr int kSumsRingOffset = kServiceRingOffset + ServiceRing::kBytes;
  static constexpr int kSharedBytes = kSumsRingOffset + kBackwardConsumers * SumsRing::kBytes;
};

// What all roles see of the shared memory.
template <class Config>
struct FusedBackwardStages : BackwardStages<BackwardShapes<Config>> {
  using Shapes = BackwardShapes<Config>;
  unsigned char* memory;
  TilePlaces places;
  typename Shapes::ValueRing values;
  typename Shapes::ServiceRing service;

  __device__ __forceinline__ explicit FusedBackwardStages(unsigned char* shared_memory)
      : BackwardStages<Shapes>(tile::shared_address(shared_memory)),
        memory(shared_memory),
        places(shared_memory + Shapes::kPlaceOffset),
        values{this->shared + Shapes::kValueRingOffset},
        service{this->shared + Shapes::kServiceRingOffset} {}

  // Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init() const {
    this->query.init(kBackwardConsumers * 128);
    this->dout.init(kBackwardConsumers * 128);
    this->keys.init(kBackwardConsumers * 128);
    values.init(kBackwardConsumers * 128);
    service.init(Config::kServesRows ? kServiceWarps : Shapes::kParts());
    ServiceStaging::init(memory + Shapes::kServiceOffset);
    for (int consumer = 0; consumer < kBackwardConsumers; ++consumer)
      sums(consumer).init(1, /*fillers=*/128);
    ptx::mbarrier_init_fence();
  }

  __device__ __forceinline__ typename Shapes::SumsRing sums(int consumer) const {
    return {this->shared + Shapes::kSumsRingOffset + consumer * Shapes::SumsRing::kBytes};
  }
  // Where a consumer stages its part of dq.
  __device__ __forceinline__ unsigned char* staged_sums(int consumer) const {
    return memory + Shapes::kQueryGradientOffset +
           Shapes::query_gradient_offset(consumer) * static_cast<int>(sizeof(float));
  }
  // Where the key tile of that number, of the CTA's, lies.
  __device__ __forceinline__ attention::TilePlace place(unsigned number) const {
    return places.get(number % Shapes::kPlaces);
  }
};

}  // namespace jfa::sm90
