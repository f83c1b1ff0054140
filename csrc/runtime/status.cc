#include "runtime/status.h"

namespace jax_flash_attn::runtime {

Status Status::invalid_argument(std::string message) {
  return Status(StatusCode::kInvalidArgument, std::move(message));
}

Status Status::unimplemented(std::string message) {
  return Status(StatusCode::kUnimplemented, std::move(message));
}

Status Status::failed_precondition(std::string message) {
  return Status(StatusCode::kFailedPrecondition, std::move(message));
}

Status Status::resource_exhausted(std::string message) {
  return Status(StatusCode::kResourceExhausted, std::move(message));
}

Status Status::internal(std::string message) {
  return Status(StatusCode::kInternal, std::move(message));
}

}  // namespace jax_flash_attn::runtime
