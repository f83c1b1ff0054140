// The tile table of the sm80 family: which tiles compute a call, by head dim, features and the
// shared memory a CTA can have.
#pragma once

#include <string>

#include "launchers/attention_spec.h"
#include "launchers/target.h"
#include "runtime/status.h"

namespace jax_flash_attn::launchers::sm80 {

struct ForwardTiles {
  int tile_q;
  int tile_k;
  int warps;
  int score_unroll;  // steps of q k^T unrolled together: fewer hold fewer registers
  int ctas;  // per multiprocessor: caps the registers of a thread at 65536 / (ctas * threads)
};

struct BackwardTiles {
  int tile_q;
  int tile_k;
  int warps;
  int score_row_warps;  // of `warps`, how many lie along the rows of each of the three products
  int key_row_warps;
  int query_row_warps;
  int stages;        // of q and dout
  int score_unroll;  // as in ForwardTiles, also for dout v^T
  int ctas;
};

runtime::StatusOr<ForwardTiles> forward_tiles(const AttentionSpec& spec,
                                              const AttentionShape& shape, const Target& target);
runtime::StatusOr<BackwardTiles> backward_tiles(const AttentionSpec& spec,
                                                const AttentionShape& shape, const Target& target);

// Dynamic shared memory of the kernels built from these tiles (sm80/forward.cuh,
// sm80/backward.cuh).
int forward_shared_bytes(const ForwardTiles& tiles, int head_dim);
int backward_shared_bytes(const BackwardTiles& tiles, int head_dim);
int backward_postprocess_shared_bytes(const BackwardTiles& tiles, int head_dim);

// Tiles as explain() prints them.
std::string describe(const ForwardTiles& tiles);
std::string describe(const BackwardTiles& tiles);

}  // namespace jax_flash_attn::launchers::sm80
