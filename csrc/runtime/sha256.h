// Streaming SHA-256 (FIPS 180-4), for cache keys and for the digest that guards a cache entry.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace jax_flash_attn::runtime {

class Sha256 {
 public:
  // Adds bytes to the message.
  void update(std::string_view bytes);

  // Adds the field's length and then its bytes, so that neighbouring fields cannot run together.
  void update_field(std::string_view field);

  // The digest of the message as 64 lowercase hex digits. Ends the stream: call once.
  std::string finish_hex();

 private:
  static constexpr std::size_t kChunkBytes = 64;

  void process_chunk(const std::uint8_t* chunk);

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, kChunkBytes> pending_ = {};
  std::size_t num_pending_ = 0;
  std::uint64_t message_bytes_ = 0;
};

}  // namespace jax_flash_attn::runtime
