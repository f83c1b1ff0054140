// Custom call flash_attention_backward:
//   (q, k, v | q, kv | qkv), [slopes], [dropout_keys], out, lse, dout, [dlse]
//     -> (dq, dk, dv | dq, dkv | dqkv), dq_accum, statistics, head_states, [turns]
// dk and dv may have several heads for each of k's, which the caller sums.
// dlse is there when the attribute has_dlse says so, turns when the call is deterministic.
#include "ffi/attributes.h"
#include "ffi/buffers.h"
#include "ffi/handlers.h"
#include "launchers/backward.h"

namespace jax_flash_attn::ffi {
namespace {

using launchers::BackwardCall;
using runtime::Status;
using runtime::StatusOr;

StatusOr<BackwardCall> decode(const xla::ffi::Dictionary& attributes, BufferReader buffers) {
  BackwardCall call{};
  JFA_ASSIGN_OR_RETURN(call.spec, decode_spec(attributes));
  const auto has_dlse = attributes.get<bool>("has_dlse");
  if (has_dlse.has_error()) return Status::invalid_argument(has_dlse.error().message());
  const QkvViews inputs = read_qkv(call.spec.packing, [&] { return buffers.next_argument(); });
  if (call.spec.alibi) call.slopes = head_values(buffers.next_argument());
  if (call.spec.dropout()) call.dropout_keys = head_values(buffers.next_argument());
  call.out = tensor_view(buffers.next_argument());
  const auto lse = buffers.next_argument();
  const auto dout = buffers.next_argument();
  call.lse = static_cast<const float*>(lse.untyped_data());
  call.lse_batches = static_cast<int>(batch_of(lse));
  call.dout = tensor_view(dout);
  call.dlse_batches = 1;
  if (*has_dlse) {
    const auto dlse = buffers.next_argument();
    call.dlse = static_cast<const float*>(dlse.untyped_data());
    call.dlse_batches = static_cast<int>(batch_of(dlse));
  }
  std::int64_t batch = 0;
  const QkvViews gradients = read_qkv(call.spec.packing, [&] {
    const auto buffer = buffers.next_result();
    batch = buffer.dimensions()[0];
    return buffer;
  });
  call.dq_accum = static_cast<float*>(buffers.next_result().untyped_data());
  call.statistics = static_cast<float*>(buffers.next_result().untyped_data());
  call.head_states = static_cast<int*>(buffers.next_result().untyped_data());
  if (call.spec.deterministic) call.turns = static_cast<int*>(buffers.next_result().untyped_data());
  JFA_RETURN_IF_ERROR(buffers.finish());
  JFA_ASSIGN_OR_RETURN(const launchers::Element element, element_of(inputs.dtype));
  const bool whole_groups = inputs.heads_k > 0 && inputs.heads % inputs.heads_k == 0;
  const bool whole_parts =
      whole_groups && gradients.heads_k > 0 && gradients.heads_k % inputs.heads_k == 0;
  const bool whole_heads = whole_parts && (inputs.heads % gradients.heads_k == 0 ||
                                           gradients.heads_k % inputs.heads == 0);
  if (!whole_heads)
    return Status::invalid_argument(
        "The heads of k and v of a flash attention call do not divide those of q and of dk and dv, "
        "or those of dk and dv are neither a divisor nor a multiple of those of q.");
  call.key_parts = static_cast<int>(gradients.heads_k / inputs.heads_k);
  call.shape = {element,           batch,          inputs.seqlen_q, inputs.seqlen_k, inputs.heads,
                gradients.heads_k, inputs.head_dim};
  call.q = inputs.q;
  call.k = inputs.k;
  call.v = inputs.v;
  call.dq = gradients.q;
  call.dk = gradients.k;
  call.dv = gradients.v;
  JFA_RETURN_IF_ERROR(check_alignment(call.q, "q"));
  JFA_RETURN_IF_ERROR(check_alignment(call.k, "k"));
  JFA_RETURN_IF_ERROR(check_alignment(call.v, "v"));
  JFA_RETURN_IF_ERROR(check_alignment(call.out, "out"));
  JFA_RETURN_IF_ERROR(check_alignment(call.dout, "dout"));
  JFA_RETURN_IF_ERROR(check_alignment(call.dk, "dk"));
  JFA_RETURN_IF_ERROR(check_alignment(call.dv, "dv"));
  return call;
}

xla::ffi::Error initialize(xla::ffi::Dictionary attributes, xla::ffi::RemainingArgs args,
                           xla::ffi::RemainingRets rets) {
  const auto call = decode(attributes, BufferReader(args, rets));
  return to_ffi_error(call.ok() ? launchers::prepare_backward(*call) : call.status());
}

xla::ffi::Error execute(runtime::CUstream stream, xla::ffi::Dictionary attributes,
                        xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets) {
  const auto call = decode(attributes, BufferReader(args, rets));
  return to_ffi_error(call.ok() ? launchers::run_backward(*call, stream) : call.status());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(flash_attention_backward_initialize, initialize,
                              xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>()
                                  .Attrs()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(flash_attention_backward_execute, execute,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<runtime::CUstream>>()
                                  .Attrs()
                                  .RemainingArgs()
                                  .RemainingRets(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash_attn::ffi
