// A kernel family and tiles forced by tests and tuning in place of the tables' choice.
#pragma once

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "runtime/status.h"

namespace jax_flash_attn::launchers {

struct TileOverride {
  std::string family;        // "sm80" or "sm90"; of the backward also "sm90split", "sm90head",
                             // "sm90cluster"
  std::vector<int> numbers;  // of the family's Tiles struct, in order; empty: the table's choice

  // Needs: Tiles is the family's, all of whose fields are ints, and numbers are not empty.
  template <typename Tiles>
  Tiles as() const {
    Tiles tiles;
    std::memcpy(&tiles, numbers.data(), sizeof(tiles));
    return tiles;
  }
};

// From text: a family ("sm80"), or a family and its tiles ("sm80:128,64,4,4,2"); none for an empty
// one. `operation` is "forward" or "backward".
runtime::StatusOr<std::optional<TileOverride>> parse_tile_override(const std::string& operation,
                                                                   const std::string& text);

// Sets what every call of an operation in this process is forced to, until it is called again.
// Returns the text that was in force.
runtime::StatusOr<std::string> override_tiles(const std::string& operation,
                                              const std::string& text);
std::optional<TileOverride> forward_override();
std::optional<TileOverride> backward_override();
// A number for what both operations are forced to, the same whenever that is the same: a choice
// that was remembered under it is still right.
int tile_setting();

}  // namespace jax_flash_attn::launchers
