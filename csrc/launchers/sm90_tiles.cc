#include "launchers/sm90_tiles.h"

#include <cstddef>

#include "launchers/tile_table.h"

namespace jax_flash_attn::launchers::sm90 {
namespace {

using runtime::Status;
using runtime::StatusOr;

template <typename Tiles>
struct Row {
  int max_head_dim;
  Features features;
  Tiles tiles;
  Lengths lengths = Lengths::kAny;

  bool serves_length(const AttentionShape& shape) const {
    return lengths == Lengths::kAny || is_short(shape);
  }
};

// Rows are tried from the top; the first that serves the head dim, the features and the length is
// taken.
//                                tile_q  tile_k  query, key, value stages  prob_buffers
constexpr Row<ForwardTiles> kForward[] = {
    {64, Features::kMasked, {128, 128, 2, 3, 3, 2}, Lengths::kShort},
    {48, Features::kNoDropout, {192, 128, 2, 2, 2, 1}},
    {48, Features::kAny, {192, 96, 2, 2, 2, 1}},
    {64, Features::kAny, {192, 128, 2, 2, 2, 1}},
    {96, Features::kFull, {192, 96, 2, 2, 2, 1}},
    {128, Features::kAny, {128, 128, 2, 2, 2, 2}},
    {192, Features::kFull, {128, 96, 1, 2, 2, 2}},
    {192, Features::kNoDropout, {128, 112, 1, 2, 2, 1}},
    {192, Features::kAny, {128, 64, 2, 2, 2, 1}},
    {kAnyHeadDim, Features::kNoDropout, {128, 80, 1, 2, 2, 1}},
    {kAnyHeadDim, Features::kAny, {128, 48, 2, 2, 2, 1}},
};

//                                 tile_q  tile_k  query, dout stages
constexpr Row<BackwardTiles> kBackward[] = {
    {96, Features::kAny, {64, 128, 2, 2}},         {128, Features::kNoDropout, {64, 128, 2, 2}},
    {128, Features::kNoSoftcap, {64, 128, 2, 2}},  {192, Features::kAny, {64, 64, 2, 2}},
    {kAnyHeadDim, Features::kAny, {64, 64, 2, 1}},
};

template <typename Tiles, std::size_t kRows, typename SharedBytes>
StatusOr<Tiles> choose(const Row<Tiles> (&rows)[kRows], const AttentionSpec& spec,
                       const AttentionShape& shape, const Target& target,
                       SharedBytes shared_bytes) {
  const int head_dim = static_cast<int>(shape.head_dim);
  for (const Row<Tiles>& row : rows) {
    if (head_dim <= row.max_head_dim && serves(row.features, spec) && row.serves_length(shape) &&
        shared_bytes(row.tiles, head_dim) <= target.shared_bytes)
      return row.tiles;
  }
  return Status::unimplemented("No tiles of the sm90 family serve head_dim " +
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
  const int places = 2 * 16 * tiles.query_stages;
  const int barriers = 2 * 8 * (tiles.query_stages + tiles.key_stages + tiles.value_stages);
  return tiles.query_stages * tile_bytes(tiles.tile_q, head_dim) +
         (tiles.key_stages + tiles.value_stages) * tile_bytes(tiles.tile_k, head_dim) + places +
         barriers;
}

int forward_threads(const ForwardTiles& tiles) { return (tiles.tile_q / 64 + 1) * 128; }

std::string describe(const ForwardTiles& tiles) {
  return "sm90 " + std::to_string(tiles.tile_q) + "x" + std::to_string(tiles.tile_k) + ", " +
         std::to_string(tiles.tile_q / 64) + " consumers, " + std::to_string(tiles.key_stages) +
         " + " + std::to_string(tiles.value_stages) + " stages";
}

int backward_shared_bytes(const BackwardTiles& tiles, int head_dim) {
  const int stages = tiles.query_stages + tiles.dout_stages;
  const int statistics = stages * tiles.tile_q * 4;
  const int barriers = 2 * 8 * (stages + (is_wide(tiles) ? 2 : 1));
  // Parts of dq, on the way to their sums; the wide kernel exchanges probabilities besides.
  const int fp32_columns = is_wide(tiles) ? 2 * 64 + tiles.tile_k : (head_dim + 15) / 16 * 16;
  return 2 * tile_bytes(tiles.tile_k, head_dim) + stages * tile_bytes(tiles.tile_q, head_dim) +
         2 * tile_bytes(tiles.tile_q, tiles.tile_k) + tiles.tile_q * fp32_columns * 4 + statistics +
         barriers;
}

int backward_postprocess_shared_bytes(const BackwardTiles& tiles, int head_dim) {
  return tile_bytes(tiles.tile_q, head_dim);
}

std::string describe(const BackwardTiles& tiles) {
  return "sm90 " + std::to_string(tiles.tile_q) + "x" + std::to_string(tiles.tile_k) +
         ", 2 consumers, " + std::to_string(tiles.query_stages) + " + " +
         std::to_string(tiles.dout_stages) + " stages";
}

}  // namespace jax_flash_attn::launchers::sm90
