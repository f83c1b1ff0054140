// SingleFlight<T>: a value that many threads ask for and one thread makes.
//
// The first caller runs `make`; callers that arrive meanwhile wait and share its outcome, success
// or failure. Success is kept for ever; a failure is not, so a later call tries again. No lock is
// held while `make` runs. A ready value costs one atomic load.
#pragma once

#include <atomic>
#include <exception>
#include <future>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "runtime/status.h"

namespace jax_flash_attn::runtime {

template <typename T>
class SingleFlight {
 public:
  // The value if a call to get() has made it, else null. Never blocks.
  const T* ready() const { return ready_.load(std::memory_order_acquire); }

  // The value, made by `make` (a callable returning StatusOr<T>) where there is none. The pointer
  // lives as long as this object. `make` must not call get() of the same object.
  template <typename Make>
  StatusOr<const T*> get(Make&& make) {
    if (const T* value = ready()) return value;
    std::promise<Status> promise;
    std::shared_future<Status> attempt;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (const T* value = ready()) return value;
      attempt = attempt_;
      if (!attempt.valid()) attempt_ = promise.get_future().share();
    }
    if (attempt.valid()) {
      JFA_RETURN_IF_ERROR(attempt.get());
      return ready();
    }
    Status status = store(run(std::forward<Make>(make)));
    promise.set_value(status);
    JFA_RETURN_IF_ERROR(status);
    return ready();
  }

 private:
  // An exception (out of host memory) must not leave the waiting threads with a broken promise.
  template <typename Make>
  static StatusOr<T> run(Make&& make) {
    try {
      return std::forward<Make>(make)();
    } catch (const std::exception& error) {
      return Status::internal(std::string("Unexpected C++ exception: ") + error.what());
    }
  }

  Status store(StatusOr<T> made) {
    std::lock_guard<std::mutex> lock(mutex_);
    attempt_ = {};
    if (!made.ok()) return made.status();
    value_ = std::move(made).value();
    ready_.store(&*value_, std::memory_order_release);
    return Status();
  }

  std::mutex mutex_;
  std::shared_future<Status> attempt_;  // valid while a thread is making the value
  std::optional<T> value_;
  std::atomic<const T*> ready_{nullptr};
};

}  // namespace jax_flash_attn::runtime
