// Custom call flash_attention_empty: any operands -> any results, which stay as they are. What a
// call of it costs, any custom call of these operands costs (benchmarks/dispatch.py). It touches
// no device, so it serves every platform.
#include "ffi/handlers.h"

namespace jax_flash_attn::ffi {
namespace {

xla::ffi::Error execute(xla::ffi::RemainingArgs, xla::ffi::RemainingRets) {
  return xla::ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(flash_attention_empty_execute, execute,
                              xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash_attn::ffi
