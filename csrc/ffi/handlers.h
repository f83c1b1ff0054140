// The custom call handlers: two stages each, and one that does nothing.
#pragma once

#include "ffi/xla_ffi.h"

namespace jax_flash_attn::ffi {

XLA_FFI_DECLARE_HANDLER_SYMBOL(flash_attention_forward_initialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(flash_attention_forward_execute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(flash_attention_backward_initialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(flash_attention_backward_execute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(flash_attention_empty_execute);

}  // namespace jax_flash_attn::ffi
