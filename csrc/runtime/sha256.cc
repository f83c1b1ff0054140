#include "runtime/sha256.h"

#include <algorithm>
#include <cstring>

namespace jax_flash_attn::runtime {
namespace {

// FIPS 180-4, section 4.2.2: fractional parts of the cube roots of the first 64 primes.
constexpr std::uint32_t kRoundConstants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t rotate_right(std::uint32_t word, int bits) {
  return (word >> bits) | (word << (32 - bits));
}

std::string big_endian_bytes(std::uint64_t number) {
  std::string bytes(8, '\0');
  for (int index = 0; index < 8; ++index) {
    bytes[index] = static_cast<char>(number >> (56 - 8 * index));
  }
  return bytes;
}

}  // namespace

void Sha256::update(std::string_view bytes) {
  message_bytes_ += bytes.size();
  while (!bytes.empty()) {
    const std::size_t taken = std::min(bytes.size(), kChunkBytes - num_pending_);
    std::memcpy(pending_.data() + num_pending_, bytes.data(), taken);
    num_pending_ += taken;
    bytes.remove_prefix(taken);
    if (num_pending_ == kChunkBytes) {
      process_chunk(pending_.data());
      num_pending_ = 0;
    }
  }
}

void Sha256::update_field(std::string_view field) {
  update(big_endian_bytes(field.size()));
  update(field);
}

std::string Sha256::finish_hex() {
  const std::string length_in_bits = big_endian_bytes(message_bytes_ * 8);
  update(std::string_view("\x80", 1));
  while (num_pending_ != kChunkBytes - length_in_bits.size()) update(std::string_view("\0", 1));
  update(length_in_bits);

  constexpr char kHexDigits[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(64);
  for (std::uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) hex.push_back(kHexDigits[(word >> shift) & 15]);
  }
  return hex;
}

void Sha256::process_chunk(const std::uint8_t* chunk) {
  std::uint32_t schedule[64];
  for (int t = 0; t < 16; ++t) {
    schedule[t] = static_cast<std::uint32_t>(chunk[4 * t]) << 24 |
                  static_cast<std::uint32_t>(chunk[4 * t + 1]) << 16 |
                  static_cast<std::uint32_t>(chunk[4 * t + 2]) << 8 | chunk[4 * t + 3];
  }
  for (int t = 16; t < 64; ++t) {
    const std::uint32_t early = schedule[t - 15];
    const std::uint32_t late = schedule[t - 2];
    const std::uint32_t sigma0 = rotate_right(early, 7) ^ rotate_right(early, 18) ^ (early >> 3);
    const std::uint32_t sigma1 = rotate_right(late, 17) ^ rotate_right(late, 19) ^ (late >> 10);
    schedule[t] = schedule[t - 16] + sigma0 + schedule[t - 7] + sigma1;
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (int t = 0; t < 64; ++t) {
    const std::uint32_t sum1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
    const std::uint32_t choice = (e & f) ^ (~e & g);
    const std::uint32_t sum0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
    const std::uint32_t majority = (a & b) ^ (a & c) ^ (b & c);
    const std::uint32_t from_e = h + sum1 + choice + kRoundConstants[t] + schedule[t];
    h = g;
    g = f;
    f = e;
    e = d + from_e;
    d = c;
    c = b;
    b = a;
    a = from_e + sum0 + majority;
  }
  const std::uint32_t mixed[8] = {a, b, c, d, e, f, g, h};
  for (int index = 0; index < 8; ++index) state_[index] += mixed[index];
}

}  // namespace jax_flash_attn::runtime
