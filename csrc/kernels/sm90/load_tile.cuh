// Copies of whole tiles to shared memory.
#pragma once

#include <params/tensor_map.h>
#include <ptx/tma.cuh>
#include <tile/shared_tile.cuh>

namespace jfa::sm90 {

// Starts the copies of all panels of a tile. Threads: one.
template <class Tile>
__device__ __forceinline__ void load_tile(unsigned shared, const TensorMap& map, unsigned barrier,
                                          unsigned long long cache_policy, int row, int head,
                                          int batch) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    ptx::tma_load(shared + panel * Tile::kPanelBytes, map, barrier, cache_policy,
                  panel * tile::kPanelColumns, row, head, batch);
}

}  // namespace jfa::sm90
