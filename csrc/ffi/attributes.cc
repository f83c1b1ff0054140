#include "ffi/attributes.h"

#include <string>
#include <string_view>

namespace jax_flash_attn::ffi {
namespace {

using runtime::Status;

template <typename T, typename Member>
Status read(const xla::ffi::Dictionary& attributes, std::string_view name, Member& member) {
  const auto value = attributes.get<T>(name);
  if (value.has_error()) {
    return Status::invalid_argument("attribute '" + std::string(name) +
                                    "' of a flash attention call: " + value.error().message());
  }
  member = Member(*value);
  return Status();
}

}  // namespace

runtime::StatusOr<launchers::AttentionSpec> decode_spec(const xla::ffi::Dictionary& attributes) {
  launchers::AttentionSpec spec;
  JFA_RETURN_IF_ERROR(read<double>(attributes, "softmax_scale", spec.softmax_scale));
  JFA_RETURN_IF_ERROR(read<std::int64_t>(attributes, "window_left", spec.window_left));
  JFA_RETURN_IF_ERROR(read<std::int64_t>(attributes, "window_right", spec.window_right));
  JFA_RETURN_IF_ERROR(read<bool>(attributes, "top_left", spec.top_left));
  JFA_RETURN_IF_ERROR(read<double>(attributes, "softcap", spec.softcap));
  JFA_RETURN_IF_ERROR(read<bool>(attributes, "alibi", spec.alibi));
  JFA_RETURN_IF_ERROR(read<double>(attributes, "dropout_p", spec.dropout_p));
  JFA_RETURN_IF_ERROR(read<bool>(attributes, "deterministic", spec.deterministic));
  JFA_RETURN_IF_ERROR(read<std::string_view>(attributes, "packing", spec.packing));
  return spec;
}

xla::ffi::Error to_ffi_error(const Status& status) {
  using runtime::StatusCode;
  switch (status.code()) {
    case StatusCode::kOk:
      return xla::ffi::Error::Success();
    case StatusCode::kInvalidArgument:
      return xla::ffi::Error(xla::ffi::ErrorCode::kInvalidArgument, status.message());
    case StatusCode::kUnimplemented:
      return xla::ffi::Error(xla::ffi::ErrorCode::kUnimplemented, status.message());
    case StatusCode::kFailedPrecondition:
      return xla::ffi::Error(xla::ffi::ErrorCode::kFailedPrecondition, status.message());
    case StatusCode::kResourceExhausted:
      return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, status.message());
    case StatusCode::kInternal:
      break;
  }
  return xla::ffi::Error(xla::ffi::ErrorCode::kInternal, status.message());
}

}  // namespace jax_flash_attn::ffi
