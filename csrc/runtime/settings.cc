#include "runtime/settings.h"

#include <atomic>
#include <utility>

namespace jax_flash_attn::runtime {
namespace {

std::atomic<const Settings*>& current_settings() {
  static std::atomic<const Settings*> current{new Settings()};
  return current;
}

}  // namespace

void configure(Settings settings) {
  // The replaced value is leaked: other threads may hold references to it.
  current_settings().store(new Settings(std::move(settings)), std::memory_order_release);
}

const Settings& settings() { return *current_settings().load(std::memory_order_acquire); }

}  // namespace jax_flash_attn::runtime
