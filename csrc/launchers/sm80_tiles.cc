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

// Dropout, ALiBi and softcap hold more values per score in registers.
enum class Features { kPlain, kAny };

template <typename Tiles>
struct Row {
  int max_head_dim;
  Features features;
  Tiles tiles;
};

// Rows are tried from the top; the first that serves the head dim and the features and fits into
// shared memory is taken. 227 KB: sm_90, sm_100. 163 KB: sm_80. 99 KB: sm_86, sm_89, sm_120.
//                                  tile_q  tile_k  warps  unroll  ctas
constexpr Row<ForwardTiles> kForward[] = {
    {64, Features::kPlain, {128, 128, 4, 4, 2}},
    {64, Features::kAny, {128, 64, 4, 2, 2}},
    {128, Features::kPlain, {128, 48, 4, 8, 2}},
    {128, Features::kAny, {128, 32, 4, 2, 2}},
    {kAnyHeadDim, Features::kAny, {64, 64, 4, 4, 2}},
    {kAnyHeadDim, Features::kAny, {64, 32, 4, 4, 1}},
};

//                      tile_q  tile_k  warps  row warps: score key query  stages  unroll  ctas
constexpr Row<BackwardTiles> kBackward[] = {
    {64, Features::kAny, {128, 128, 8, 4, 4, 4, 2, 2, 1}},
    {64, Features::kAny, {64, 128, 8, 2, 4, 2, 1, 2, 1}},
    {128, Features::kAny, {64, 128, 8, 2, 4, 2, 2, 8, 1}},
    {128, Features::kAny, {64, 64, 8, 4, 2, 2, 1, 4, 1}},
    {192, Features::kAny, {64, 64, 8, 4, 2, 2, 1, 4, 1}},
    {kAnyHeadDim, Features::kPlain, {64, 64, 8, 4, 2, 2, 1, 4, 1}},
    {kAnyHeadDim, Features::kAny, {32, 64, 8, 2, 2, 2, 1, 4, 1}},
    {kAnyHeadDim, Features::kAny, {32, 32, 4, 2, 2, 2, 1, 4, 1}},
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

bool is_plain(const AttentionSpec& spec) {
  return !spec.alibi && !spec.dropout() && spec.softcap == 0.0 && spec.softmax_scale > 0.0;
}

// tile/shared_tile.cuh: whole panels of 64 columns of 16-bit elements.
int tile_bytes(int rows, int columns) { return rows * ((columns + 63) / 64) * 128; }

template <typename Tiles, std::size_t kRows, typename SharedBytes>
StatusOr<Tiles> choose(const Row<Tiles> (&rows)[kRows], const std::optional<Tiles>& override,
                       const AttentionSpec& spec, int head_dim, int available,
                       SharedBytes shared_bytes) {
  if (override) return *override;
  for (const Row<Tiles>& row : rows) {
    if (head_dim <= row.max_head_dim && (row.features == Features::kAny || is_plain(spec)) &&
        shared_bytes(row.tiles, head_dim) <= available)
      return row.tiles;
  }
  return Status::unimplemented("No tiles of the sm80 family serve head_dim " +
                               std::to_string(head_dim) + " in " + std::to_string(available) +
                               " bytes of shared memory.");
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

StatusOr<ForwardTiles> forward_tiles(const AttentionSpec& spec, int head_dim, int available) {
  std::lock_guard<std::mutex> lock(overrides().mutex);
  return choose(kForward, overrides().forward, spec, head_dim, available, forward_shared_bytes);
}

StatusOr<BackwardTiles> backward_tiles(const AttentionSpec& spec, int head_dim, int available) {
  std::lock_guard<std::mutex> lock(overrides().mutex);
  return choose(kBackward, overrides().backward, spec, head_dim, available, backward_shared_bytes);
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
    state.forward.reset();
    if (!tiles.empty()) {
      JFA_ASSIGN_OR_RETURN(const auto numbers, parse_numbers<5>(tiles));
      state.forward = ForwardTiles{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
    }
  } else if (operation == "backward") {
    state.backward.reset();
    if (!tiles.empty()) {
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
