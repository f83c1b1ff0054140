// In which order the keys of a query tile are walked, which is the order in which dq is summed.
#pragma once

#include <attention/visible_range.cuh>

namespace jfa::sm90 {

// Which half of its key tile a consumer of whole heads owns (sm90/head_backward.cuh). Under a mask
// they swap from key tile to key tile: what a limit on the right hides of the first queries of a
// walk is all in the second half.
template <class Config>
__device__ __forceinline__ int half_of(int consumer, int key_tile) {
  return Config::kWindowed ? consumer ^ (key_tile % 2) : consumer;
}

// The key tiles of a range, one after the other. first_key() needs valid(), next_key() has_next().
template <class Config, bool kAsWholeHeads>
struct KeyOrder;

// From the last to the first.
template <class Config>
struct KeyOrder<Config, false> {
  int end;
  int at;

  __device__ __forceinline__ explicit KeyOrder(const attention::Range& tiles)
      : end(tiles.begin * Config::kTileK), at((tiles.end - 1) * Config::kTileK) {}
  __device__ __forceinline__ bool valid() const { return at >= end; }
  __device__ __forceinline__ bool has_next() const { return at > end; }
  __device__ __forceinline__ void advance() { at -= Config::kTileK; }
  __device__ __forceinline__ int first_key() const { return at; }
  __device__ __forceinline__ int next_key() const { return at - Config::kTileK; }
};

// As consumers of whole heads add what their 64 keys give: sums are then bitwise the same.
template <class Config>
struct KeyOrder<Config, true> {
  static_assert(Config::kTileK == 64, "a consumer's half of a key tile");
  attention::Range tiles;
  int at;

  __device__ __forceinline__ explicit KeyOrder(const attention::Range& key_tiles)
      : tiles(key_tiles), at(key_tiles.begin) {}
  __device__ __forceinline__ bool valid() const { return at < tiles.end; }
  __device__ __forceinline__ bool has_next() const { return at + 1 < tiles.end; }
  __device__ __forceinline__ void advance() { ++at; }
  __device__ __forceinline__ int first_key() const { return key_of(at); }
  __device__ __forceinline__ int next_key() const { return key_of(at + 1); }

 private:
  __device__ __forceinline__ int key_of(int tile) const {
    const int swapped = tile / 2 * 2 + half_of<Config>(tile % 2, tile / 2);
    // The other half of the pair may be one that no query of the tile sees.
    const bool sees = swapped >= tiles.begin && swapped < tiles.end;
    return (sees ? swapped : tile) * Config::kTileK;
  }
};

}  // namespace jfa::sm90
