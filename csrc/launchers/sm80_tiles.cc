#include "launchers/sm80_tiles.h"

#include <array>
#include <atomic>
#include <charconv>
#include <mutex>
#include <optional>
#include <vector>

namespace jax_flash_attn::launchers {
namespace {

using runtime::Status;
using runtime::StatusOr;

constexpr int kAnyHeadDim = 256;

// What a row serves: kPlain is no dropout, ALiBi, softcap or unusual scale, all of which hold more
// values per score in registers; kFull is kPlain without a mask.
enum class Features { kFull, kPlain, kAny };

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
    {64, Chips::kAny, Features::kAny, {128, 128, 8, 4, 4, 4, 2, 2, 1}},
    {64, Chips::kAny, Features::kAny, {64, 128, 8, 2, 4, 2, 1, 2, 1}},
    {128, Chips::kAny, Features::kAny, {64, 128, 8, 2, 4, 2, 2, 8, 1}},
    {128, Chips::kAny, Features::kAny, {64, 64, 8, 4, 2, 2, 1, 4, 1}},
    {192, Chips::kAny, Features::kAny, {64, 64, 8, 4, 2, 2, 1, 4, 1}},
    {kAnyHeadDim, Chips::kAny, Features::kAny, {32, 64, 8, 2, 2, 2, 1, 4, 1}},
    {kAnyHeadDim, Chips::kAny, Features::kAny, {32, 32, 4, 2, 2, 2, 1, 4, 1}},
};

struct Overrides {
  std::mutex mutex;
  std::optional<ForwardTiles> forward;
  std::optional<BackwardTiles> backward;
  std::atomic<int> generation{0};
};

// Leaked on purpose: other threads may still launch while the process ends.
Overrides& overrides() {
  static Overrides* const instance = new Overrides;
  return *instance;
}

bool serves(Chips chips, const Target& target) {
  return chips == Chips::kAny || target.architecture == "sm_80" || target.architecture == "sm_90";
}

bool serves(Features features, const AttentionSpec& spec) {
  const bool plain =
      !spec.alibi && !spec.dropout() && spec.softcap == 0.0 && spec.softmax_scale > 0.0;
  switch (features) {
    case Features::kFull:
      return plain && !spec.windowed();
    case Features::kPlain:
      return plain;
    case Features::kAny:
      break;
  }
  return true;
}

// tile/shared_tile.cuh: whole panels of 64 columns of 16-bit elements.
int tile_bytes(int rows, int columns) { return rows * ((columns + 63) / 64) * 128; }

template <typename Tiles, std::size_t kRows, typename SharedBytes>
StatusOr<Tiles> choose(const Row<Tiles> (&rows)[kRows], const std::optional<Tiles>& override,
                       const AttentionSpec& spec, int head_dim, const Target& target,
                       SharedBytes shared_bytes) {
  if (override) return *override;
  for (const Row<Tiles>& row : rows) {
    if (head_dim <= row.max_head_dim && serves(row.chips, target) && serves(row.features, spec) &&
        shared_bytes(row.tiles, head_dim) <= target.shared_bytes)
      return row.tiles;
  }
  return Status::unimplemented("No tiles of the sm80 family serve head_dim " +
                               std::to_string(head_dim) + " in " +
                               std::to_string(target.shared_bytes) + " bytes of shared memory.");
}

template <std::size_t kCount>
StatusOr<std::array<int, kCount>> parse_numbers(const std::string& text) {
  std::array<int, kCount> numbers{};
  const char* next = text.data();
  const char* const end = next + text.size();
  for (std::size_t i = 0; i < kCount; ++i) {
    if (i > 0 && next != end && *next == ',') ++next;
    const auto parsed = std::from_chars(next, end, numbers[i]);
    next = parsed.ptr;
    if (parsed.ec != std::errc() || numbers[i] <= 0 || (i + 1 == kCount && next != end)) {
      return Status::invalid_argument("tiles must be " + std::to_string(kCount) +
                                      " positive numbers separated by commas, got '" + text + "'.");
    }
  }
  return numbers;
}

}  // namespace

StatusOr<ForwardTiles> forward_tiles(const AttentionSpec& spec, int head_dim,
                                     const Target& target) {
  std::lock_guard<std::mutex> lock(overrides().mutex);
  return choose(kForward, overrides().forward, spec, head_dim, target, forward_shared_bytes);
}

StatusOr<BackwardTiles> backward_tiles(const AttentionSpec& spec, int head_dim,
                                       const Target& target) {
  std::lock_guard<std::mutex> lock(overrides().mutex);
  return choose(kBackward, overrides().backward, spec, head_dim, target, backward_shared_bytes);
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

Status override_tiles(const std::string& operation, const std::string& tiles) {
  Overrides& state = overrides();
  std::lock_guard<std::mutex> lock(state.mutex);
  if (operation == "forward") {
    if (tiles.empty()) {
      state.forward.reset();
    } else {
      JFA_ASSIGN_OR_RETURN(const auto numbers, parse_numbers<5>(tiles));
      state.forward = ForwardTiles{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
    }
  } else if (operation == "backward") {
    if (tiles.empty()) {
      state.backward.reset();
    } else {
      JFA_ASSIGN_OR_RETURN(const auto numbers, parse_numbers<9>(tiles));
      state.backward = BackwardTiles{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
                                     numbers[5], numbers[6], numbers[7], numbers[8]};
    }
  } else {
    return Status::invalid_argument("operation must be 'forward' or 'backward', got '" + operation +
                                    "'.");
  }
  state.generation.fetch_add(1);
  return Status();
}

int tiles_generation() { return overrides().generation.load(std::memory_order_relaxed); }

}  // namespace jax_flash_attn::launchers
