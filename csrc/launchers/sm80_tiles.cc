#include "launchers/sm80_tiles.h"

#include <cstddef>

#include "launchers/tile_table.h"

namespace jax_flash_attn::launchers::sm80 {
namespace {

using runtime::Status;
using runtime::StatusOr;

// The chips that a row is for. Tiles that use every register were made spill-free with the
// compiler's output for 8.0 and 9.0; for other chips it needs a few registers more.
enum class Chips { kTuned, kAny };

template <typename Tiles>
struct Row {
  int max_head_dim;
  Chips chips;
  Features features;
  Tiles tiles;
};

// Rows are tried from the top; the first that serves the head dim, the chip and the features and
// fits into shared memory is taken.
//                                            tile_q  tile_k  warps  unroll  ctas
constexpr Row<ForwardTiles> kForward[] = {
    {64, Chips::kTuned, Features::kPlain, {128, 128, 4, 4, 2}},
    {64, Chips::kAny, Features::kAny, {128, 64, 4, 2, 2}},
    {128, Chips::kTuned, Features::kFull, {128, 48, 4, 4, 2}},
    {128, Chips::kTuned, Features::kPlain, {128, 48, 4, 8, 2}},
    {kAnyHeadDim, Chips::kAny, Features::kAny, {64, 64, 4, 4, 2}},
};

// tile_q, tile_k, warps; row warps of the scores, of dk and dv, of dq; stages, unroll, ctas
constexpr Row<BackwardTiles> kBackward[] = {
    {64, Chips::kAny, Features::kNoSoftcap, {128, 128, 8, 4, 4, 4, 2, 2, 1}},
    {64, Chips::kAny, Features::kAny, {128, 128, 8, 4, 4, 4, 2, 1, 1}},
    {64, Chips::kAny, Features::kAny, {64, 128, 8, 2, 4, 2, 1, 2, 1}},
    {128, Chips::kAny, Features::kAny, {64, 128, 8, 2, 4, 2, 2, 8, 1}},
    {128, Chips::kAny, Features::kAny, {64, 64, 8, 4, 2, 2, 1, 4, 1}},
    {192, Chips::kAny, Features::kAny, {64, 64, 8, 4, 2, 2, 1, 4, 1}},
    {kAnyHeadDim, Chips::kAny, Features::kAny, {32, 64, 8, 2, 2, 2, 1, 4, 1}},
    {kAnyHeadDim, Chips::kAny, Features::kAny, {32, 32, 4, 2, 2, 2, 1, 4, 1}},
};

bool serves(Chips chips, const Target& target) {
  return chips == Chips::kAny || target.architecture == "sm_80" || target.architecture == "sm_90";
}

template <typename Tiles, std::size_t kRows, typename SharedBytes>
StatusOr<Tiles> choose(const Row<Tiles> (&rows)[kRows], const AttentionSpec& spec,
                       const AttentionShape& shape, const Target& target,
                       SharedBytes shared_bytes) {
  const int head_dim = static_cast<int>(shape.head_dim);
  for (const Row<Tiles>& row : rows) {
    if (head_dim <= row.max_head_dim && serves(row.chips, target) && serves(row.features, spec) &&
        shared_bytes(row.tiles, head_dim) <= target.shared_bytes)
      return row.tiles;
  }
  return Status::unimplemented("No tiles of the sm80 family serve head_dim " +
                               std::to_string(head_dim) + " in " +
                               std::to_string(target.shared_bytes) + " bytes of shared memory.");
}

}  // namespace

StatusOr<ForwardTiles> forward_tiles(const AttentionSpec& spec, const AttentionShape& shape,
                                     const Target& target) {
  return choose(kForward, spec, shape, target, forward_shared_bytes);
}

StatusOr<BackwardTiles> backward_tiles(const AttentionSpec& spec, const AttentionShape& shape,
                                       const Target& target) {
  return choose(kBackward, spec, shape, target, backward_shared_bytes);
}

int forward_shared_bytes(const ForwardTiles& tiles, int head_dim) {
  return tile_bytes(tiles.tile_q, head_dim) + 2 * tile_bytes(tiles.tile_k, head_dim);
}

int backward_shared_bytes(const BackwardTiles& tiles, int head_dim) {
  const int statistics = 2 * tiles.tile_q * 4;
  return 2 * tile_bytes(tiles.tile_k, head_dim) +
         tiles.stages * (2 * tile_bytes(tiles.tile_q, head_dim) + statistics) +
         2 * tile_bytes(tiles.tile_q, tiles.tile_k);
}

int backward_postprocess_shared_bytes(const BackwardTiles& tiles, int head_dim) {
  return tile_bytes(tiles.tile_q, head_dim);
}

std::string describe(const ForwardTiles& tiles) {
  return "sm80 " + std::to_string(tiles.tile_q) + "x" + std::to_string(tiles.tile_k) + ", " +
         std::to_string(tiles.warps) + " warps";
}

std::string describe(const BackwardTiles& tiles) {
  return "sm80 " + std::to_string(tiles.tile_q) + "x" + std::to_string(tiles.tile_k) + ", " +
         std::to_string(tiles.warps) + " warps, " + std::to_string(tiles.stages) +
         (tiles.stages == 1 ? " stage" : " stages");
}

}  // namespace jax_flash_attn::launchers::sm80
