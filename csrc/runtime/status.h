// Status and StatusOr: how every host function reports failure.
//
// A message is one or two sentences that name the operation, what it got, what it takes and the
// next step. Only ffi/ turns a Status into an XLA error and only ffi/module.cc into a Python
// exception.
#pragma once

#include <optional>
#include <string>
#include <utility>

namespace jax_flash_attn::runtime {

enum class StatusCode {
  kOk,
  kInvalidArgument,     // the caller's mistake
  kUnimplemented,       // valid, but no kernel does it
  kFailedPrecondition,  // the machine lacks something: driver, NVRTC, a context
  kResourceExhausted,   // out of device memory
  kInternal,            // a defect: a kernel that does not compile, an unexpected driver error
};

// The outcome of an operation: ok, or a code and a message.
class [[nodiscard]] Status {
 public:
  Status() = default;

  static Status invalid_argument(std::string message);
  static Status unimplemented(std::string message);
  static Status failed_precondition(std::string message);
  static Status resource_exhausted(std::string message);
  static Status internal(std::string message);

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// A value, or the Status that says why there is none. value() requires ok().
template <typename T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(Status status) : status_(std::move(status)) {
    if (status_.ok()) status_ = Status::internal("StatusOr was made from an ok Status.");
  }
  StatusOr(T value) : value_(std::move(value)) {}

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }

  T& value() & { return *value_; }
  const T& value() const& { return *value_; }
  T&& value() && { return std::move(*value_); }
  T& operator*() & { return *value_; }
  const T& operator*() const& { return *value_; }
  T&& operator*() && { return std::move(*value_); }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace jax_flash_attn::runtime

// Returns the Status of `expression` from the enclosing function unless it is ok.
#define JFA_RETURN_IF_ERROR(expression)                                                \
  do {                                                                                 \
    if (::jax_flash_attn::runtime::Status jfa_status = (expression); !jfa_status.ok()) \
      return jfa_status;                                                               \
  } while (false)

#define JFA_CONCATENATE_EXPANDED(left, right) left##right
#define JFA_CONCATENATE(left, right) JFA_CONCATENATE_EXPANDED(left, right)
#define JFA_ASSIGN_OR_RETURN_NAMED(result, declaration, expression) \
  auto result = (expression);                                       \
  if (!result.ok()) return result.status();                         \
  declaration = std::move(result).value()

// Declares or assigns the value of a StatusOr, or returns its Status:
// JFA_ASSIGN_OR_RETURN(const DriverApi* cuda, driver());
#define JFA_ASSIGN_OR_RETURN(declaration, expression) \
  JFA_ASSIGN_OR_RETURN_NAMED(JFA_CONCATENATE(jfa_result_, __LINE__), declaration, expression)
