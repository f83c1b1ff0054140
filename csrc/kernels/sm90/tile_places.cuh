// Where the tiles of a persistent CTA lie, as its producer tells the consumers through shared
// memory. Divisions stand between the number of a CTA and its tile; the producer has time for them.
#pragma once

#include <attention/head_address.cuh>
#include <ptx/special_register.cuh>
#include <ptx/warpgroup.cuh>

namespace jfa::sm90 {

constexpr int kNoTile = -1;  // there are no more

// Who writes and who reads a slot is ordered by the ring that the place belongs to.
struct TilePlaces {
  static constexpr int kSlotBytes = static_cast<int>(sizeof(int4));
  int4* slots;

  __device__ __forceinline__ explicit TilePlaces(unsigned char* shared_memory)
      : slots(reinterpret_cast<int4*>(shared_memory)) {}

  __device__ __forceinline__ void put(int slot, const attention::TilePlace& place,
                                      int pass = 0) const {
    slots[slot] = make_int4(place.tile, place.head, place.batch, pass);
  }
  // Threads: a whole warp.
  __device__ __forceinline__ attention::TilePlace get(int slot) const {
    const attention::TilePlace place = read(slot);
    return {ptx::uniform(place.tile), ptx::uniform(place.head), ptx::uniform(place.batch)};
  }
  // Which pass over the tile it is, where there are several. Threads: a whole warp.
  __device__ __forceinline__ int pass(int slot) const { return ptx::uniform(slots[slot].w); }
  __device__ __forceinline__ attention::TilePlace read(int slot) const {
    const int4 place = slots[slot];
    return {place.x, place.y, place.z};
  }
};

// The place that an order has come to, or kNoTile behind its end.
template <class Order>
__device__ __forceinline__ attention::TilePlace next_place(const Order& order) {
  return order.valid() ? order.place() : attention::TilePlace{kNoTile, 0, 0};
}

}  // namespace jfa::sm90
