// A ring of shared memory stages between threads that fill and threads that use them.
#pragma once

#include <ptx/mbarrier.cuh>

namespace jfa::tile {

// Where one role stands in a ring. Roles that start with an equal position and advance equally
// agree on every stage without talking. One counter, where stage and round would take a register
// each from loops that have none to spare.
template <int kStages>
struct RingPosition {
  unsigned fills = 0;  // so far

  __device__ __forceinline__ int stage() const { return fills % kStages; }
  __device__ __forceinline__ unsigned round() const { return fills / kStages % 2; }
  __device__ __forceinline__ void advance() { ++fills; }
};

// The same in two registers, without a division at each use, where the number of stages is no power
// of two.
template <int kStages>
class RingCursor {
 public:
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ unsigned round() const { return round_; }
  __device__ __forceinline__ void advance() {
    if (++stage_ >= kStages) {
      stage_ -= kStages;
      round_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  unsigned round_ = 0;
};

// The two barriers of each stage: `full` completes when a stage is filled, `empty` when all its
// users have let go of it. Position: RingPosition or RingCursor, of kStages.
template <int kStages>
struct Ring {
  unsigned barriers;  // shared address; kStages full ones, then kStages empty ones

  static constexpr int kBytes = 2 * kStages * 8;

  __device__ __forceinline__ unsigned full(int stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ unsigned empty(int stage) const {
    return barriers + (kStages + stage) * 8;
  }

  // fillers: threads that fill a stage. Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init(int users, int fillers = 1) const {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), fillers);
      ptx::mbarrier_init(empty(stage), users);
    }
  }

  // For the filling thread: waits until the stage is free and announces what will be copied to it.
  // The first round finds every stage free.
  template <class Position>
  __device__ __forceinline__ void begin_fill(const Position& at, int bytes) const {
    await_empty(at);
    announce(at, bytes);
  }
  // In two steps, for who stores to the stage by itself in between.
  template <class Position>
  __device__ __forceinline__ void await_empty(const Position& at) const {
    ptx::mbarrier_wait(empty(at.stage()), at.round() ^ 1);
  }
  template <class Position>
  __device__ __forceinline__ bool is_empty(const Position& at) const {
    return ptx::mbarrier_test(empty(at.stage()), at.round() ^ 1);
  }
  template <class Position>
  __device__ __forceinline__ void announce(const Position& at, int bytes) const {
    ptx::mbarrier_arrive_expect(full(at.stage()), bytes);
  }

  // For threads that have filled a stage by stores of their own. Threads: each filler.
  template <class Position>
  __device__ __forceinline__ void finish_fill(const Position& at) const {
    ptx::mbarrier_arrive(full(at.stage()));
  }

  template <class Position>
  __device__ __forceinline__ void wait_full(const Position& at) const {
    ptx::mbarrier_wait(full(at.stage()), at.round());
  }

  // Threads: one of each user.
  __device__ __forceinline__ void release(int stage) const { ptx::mbarrier_arrive(empty(stage)); }
};

}  // namespace jfa::tile
