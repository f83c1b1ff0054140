#include "launchers/tile_override.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <mutex>
#include <utility>

#include "launchers/sm80_tiles.h"
#include "launchers/sm90_tiles.h"

namespace jax_flash_attn::launchers {
namespace {

using runtime::Status;
using runtime::StatusOr;

// Every field of a Tiles struct is an int.
template <typename Tiles>
constexpr std::size_t kNumbers = sizeof(Tiles) / sizeof(int);

struct Overridable {
  const char* operation;
  const char* family;
  std::size_t numbers;
};
constexpr Overridable kOverridable[] = {
    {"forward", "sm80", kNumbers<sm80::ForwardTiles>},
    {"backward", "sm80", kNumbers<sm80::BackwardTiles>},
    {"forward", "sm90", kNumbers<sm90::ForwardTiles>},
    {"backward", "sm90", kNumbers<sm90::BackwardTiles>},
    {"backward", "sm90split", kNumbers<sm90::SplitBackwardTiles>},
    {"backward", "sm90head", kNumbers<sm90::HeadBackwardTiles>},
    {"backward", "sm90cluster", kNumbers<sm90::ClusterBackwardTiles>},
};

struct Overrides {
  std::mutex mutex;
  std::optional<TileOverride> forward;
  std::optional<TileOverride> backward;
  // Every pair of texts that was ever set, the first for none: what was made for one is found again
  // when it is set again.
  std::vector<std::array<std::string, 2>> settings = {{}};
  std::atomic<int> setting{0};  // index of the one in force
};

// Leaked on purpose: other threads may still launch while the process ends.
Overrides& overrides() {
  static Overrides* const instance = new Overrides;
  return *instance;
}

StatusOr<std::vector<int>> parse_numbers(const std::string& text, std::size_t count) {
  std::vector<int> numbers(count);
  const char* next = text.data();
  const char* const end = next + text.size();
  for (std::size_t i = 0; i < count; ++i) {
    if (i > 0 && next != end && *next == ',') ++next;
    const auto parsed = std::from_chars(next, end, numbers[i]);
    next = parsed.ptr;
    if (parsed.ec != std::errc() || numbers[i] <= 0 || (i + 1 == count && next != end)) {
      return Status::invalid_argument("tiles must be " + std::to_string(count) +
                                      " positive numbers separated by commas, got '" + text + "'.");
    }
  }
  return numbers;
}

}  // namespace

StatusOr<std::optional<TileOverride>> parse_tile_override(const std::string& operation,
                                                          const std::string& text) {
  if (operation != "forward" && operation != "backward") {
    return Status::invalid_argument("operation must be 'forward' or 'backward', got '" + operation +
                                    "'.");
  }
  if (text.empty()) return std::optional<TileOverride>();
  const std::size_t colon = text.find(':');
  TileOverride result{text.substr(0, colon), {}};
  for (const Overridable& choice : kOverridable) {
    if (operation != choice.operation || result.family != choice.family) continue;
    if (colon != std::string::npos) {
      JFA_ASSIGN_OR_RETURN(result.numbers, parse_numbers(text.substr(colon + 1), choice.numbers));
    }
    return std::optional<TileOverride>(std::move(result));
  }
  return Status::invalid_argument("tiles must be a kernel family that has the " + operation +
                                  ", such as 'sm80', and may name its numbers behind a colon; got "
                                  "'" +
                                  text + "'.");
}

StatusOr<std::string> override_tiles(const std::string& operation, const std::string& text) {
  JFA_ASSIGN_OR_RETURN(std::optional<TileOverride> parsed, parse_tile_override(operation, text));
  Overrides& state = overrides();
  const bool is_forward = operation == "forward";
  std::lock_guard<std::mutex> lock(state.mutex);
  (is_forward ? state.forward : state.backward) = std::move(parsed);
  std::array<std::string, 2> texts = state.settings[state.setting.load()];
  std::string replaced = std::exchange(texts[is_forward ? 0 : 1], text);
  const auto begin = state.settings.begin();
  const auto found = std::find(begin, state.settings.end(), texts);
  const auto index = static_cast<int>(found - begin);
  if (found == state.settings.end()) state.settings.push_back(std::move(texts));
  state.setting.store(index);
  return replaced;
}

std::optional<TileOverride> forward_override() {
  std::lock_guard<std::mutex> lock(overrides().mutex);
  return overrides().forward;
}

std::optional<TileOverride> backward_override() {
  std::lock_guard<std::mutex> lock(overrides().mutex);
  return overrides().backward;
}

int tile_setting() { return overrides().setting.load(std::memory_order_relaxed); }

}  // namespace jax_flash_attn::launchers
