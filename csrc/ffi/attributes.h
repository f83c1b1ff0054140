// The attributes of a custom call as an AttentionSpec.
#pragma once

#include "ffi/xla_ffi.h"
#include "launchers/attention_spec.h"
#include "runtime/status.h"

namespace jax_flash_attn::ffi {

runtime::StatusOr<launchers::AttentionSpec> decode_spec(const xla::ffi::Dictionary& attributes);

xla::ffi::Error to_ffi_error(const runtime::Status& status);

}  // namespace jax_flash_attn::ffi
