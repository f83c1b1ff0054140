// PlanTable: the kernels of each specialization, ready on each device, found by a few integers.
//
// XLA runs the initialize stage before every execution, so the usual case must cost next to
// nothing: one hash of the key and one lookup under a shared lock; no text is built.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "launchers/attention_spec.h"
#include "runtime/single_flight.h"
#include "runtime/status.h"

namespace jax_flash_attn::launchers {

// Everything that distinguishes one set of kernels from another.
struct PlanKey {
  // Device, tile setting, head dim, feature bits and length class; a backward adds bits.
  std::array<std::int32_t, 4> values;

  bool operator==(const PlanKey& other) const { return values == other.values; }
};

PlanKey plan_key(const AttentionSpec& spec, const AttentionShape& shape, int device);

struct PlanKeyHash {
  std::size_t operator()(const PlanKey& key) const;
};

template <typename Plan>
class PlanTable {
 public:
  // The plan if it is there, else null. Never compiles.
  const Plan* find(const PlanKey& key) const {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto found = plans_.find(key);
    return found == plans_.end() ? nullptr : found->second->ready();
  }

  // The plan, made by `make` where there is none; threads that ask for the same one wait for it.
  template <typename Make>
  runtime::StatusOr<const Plan*> get(const PlanKey& key, Make&& make) {
    if (const Plan* plan = find(key)) return plan;
    runtime::SingleFlight<Plan>* flight;
    {
      std::unique_lock<std::shared_mutex> lock(mutex_);
      auto& slot = plans_[key];
      if (slot == nullptr) slot = std::make_unique<runtime::SingleFlight<Plan>>();
      flight = slot.get();
    }
    return flight->get(std::forward<Make>(make));
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<PlanKey, std::unique_ptr<runtime::SingleFlight<Plan>>, PlanKeyHash> plans_;
};

}  // namespace jax_flash_attn::launchers
