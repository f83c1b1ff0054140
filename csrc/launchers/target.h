// What a choice of tiles and kernels depends on, besides the call.
#pragma once

#include <string>

namespace jax_flash_attn::launchers {

struct Target {
  std::string architecture;  // "sm_90"
  int shared_bytes;          // a CTA may have
  int multiprocessors;
};

}  // namespace jax_flash_attn::launchers
