// Custom call flash_attention_forward:
//   (q, k, v | q, kv | qkv), [slopes], [dropout_keys] -> out, lse
#include "ffi/attributes.h"
#include "ffi/buffers.h"
#include "ffi/handlers.h"
#include "launchers/forward.h"

namespace jax_flash_attn::ffi {
namespace {

using launchers::ForwardCall;
using runtime::Status;
using runtime::StatusOr;

StatusOr<ForwardCall> decode(const xla::ffi::Dictionary& attributes, BufferReader buffers) {
  ForwardCall call{};
  JFA_ASSIGN_OR_RETURN(call.spec, decode_spec(attributes));
  const QkvViews inputs = read_qkv(call.spec.packing, [&] { return buffers.next_argument(); });
  if (call.spec.alibi) call.slopes = head_values(buffers.next_argument());
  if (call.spec.dropout()) call.dropout_keys = head_values(buffers.next_argument());
  const auto out = buffers.next_result();
  const auto lse = buffers.next_result();
  JFA_RETURN_IF_ERROR(buffers.finish());
  JFA_ASSIGN_OR_RETURN(const launchers::Element element, element_of(inputs.dtype));
  call.shape = {element,      out.dimensions()[0], inputs.seqlen_q, inputs.seqlen_k,
                inputs.heads, inputs.heads_k,      inputs.head_dim};
  call.q = inputs.q;
  call.k = inputs.k;
  call.v = inputs.v;
  call.out = tensor_view(out);
  call.lse = static_cast<float*>(lse.untyped_data());
  JFA_RETURN_IF_ERROR(check_alignment(call.q, "q"));
  JFA_RETURN_IF_ERROR(check_alignment(call.k, "k"));
  JFA_RETURN_IF_ERROR(check_alignment(call.v, "v"));
  return call;
}

xla::ffi::Error initialize(xla::ffi::Dictionary attributes, xla::ffi::RemainingArgs args,
                           xla::ffi::RemainingRets rets) {
  const auto call = decode(attributes, BufferReader(args, rets));
  return to_ffi_error(call.ok() ? launchers::prepare_forward(*call) : call.status());
}

xla::ffi::Error execute(runtime::CUstream stream, xla::ffi::Dictionary attributes,
                        xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets) {
  const auto call = decode(attributes, BufferReader(args, rets));
  return to_ffi_error(call.ok() ? launchers::run_forward(*call, stream) : call.status());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(flash_attention_forward_initialize, initialize,
                              xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>()
                                  .Attrs()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(flash_attention_forward_execute, execute,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<runtime::CUstream>>()
                                  .Attrs()
                                  .RemainingArgs()
                                  .RemainingRets(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash_attn::ffi
