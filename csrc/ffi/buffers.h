// The buffers of a custom call as tensors that the launchers understand. Shapes come from the
// buffers and were checked when the call was traced; what is checked here protects the kernels'
// addresses.
#pragma once

#include <params/tensor_view.h>

#include "ffi/xla_ffi.h"
#include "launchers/attention_spec.h"
#include "runtime/status.h"

namespace jax_flash_attn::ffi {

// Hands out the buffers of a call in order, and remembers the first thing that was wrong, so that a
// handler reads as the list of its operands.
class BufferReader {
 public:
  BufferReader(xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets)
      : args_(args), rets_(rets) {}

  xla::ffi::AnyBuffer next_argument();
  xla::ffi::AnyBuffer next_result();
  runtime::Status finish() const;  // every buffer was taken, and none was missing

 private:
  xla::ffi::RemainingArgs args_;
  xla::ffi::RemainingRets rets_;
  std::size_t next_argument_ = 0;
  std::size_t next_result_ = 0;
  bool missing_ = false;
};

// A tensor of rank 4, (batch, seqlen, heads, head_dim), dense and row-major.
jfa::TensorView tensor_view(const xla::ffi::AnyBuffer& buffer);

// q, k and v, or dq, dk and dv: three buffers, or slices of packed ones.
struct QkvViews {
  jfa::TensorView q, k, v;
  std::int64_t seqlen_q, seqlen_k, heads, heads_k, head_dim;
  xla::ffi::DataType dtype;
};
template <typename Next>
QkvViews read_qkv(const std::string& packing, Next next);

// One value per (batch, head).
jfa::HeadValues head_values(const xla::ffi::AnyBuffer& buffer);

std::int64_t batch_of(const xla::ffi::AnyBuffer& buffer);

runtime::StatusOr<launchers::Element> element_of(xla::ffi::DataType dtype);

// 16-byte copies need 16-byte addresses; XLA's buffers have them, a slice of one may not.
runtime::Status check_alignment(const jfa::TensorView& view, const char* name);

// The (batch, seqlen, parts, heads, head_dim) slice at `part`.
jfa::TensorView packed_view(const xla::ffi::AnyBuffer& buffer, int part);

template <typename Next>
QkvViews read_qkv(const std::string& packing, Next next) {
  QkvViews views{};
  const xla::ffi::AnyBuffer first = next();
  const auto dims = first.dimensions();
  views.dtype = first.element_type();
  views.seqlen_q = dims[1];
  views.heads = dims[dims.size() - 2];
  views.head_dim = dims[dims.size() - 1];
  if (packing == "qkv") {
    views.seqlen_k = views.seqlen_q;
    views.heads_k = views.heads;
    views.q = packed_view(first, 0);
    views.k = packed_view(first, 1);
    views.v = packed_view(first, 2);
    return views;
  }
  views.q = tensor_view(first);
  const xla::ffi::AnyBuffer second = next();
  const auto dims_k = second.dimensions();
  views.seqlen_k = dims_k[1];
  views.heads_k = dims_k[dims_k.size() - 2];
  if (packing == "kv") {
    views.k = packed_view(second, 0);
    views.v = packed_view(second, 1);
  } else {
    views.k = tensor_view(second);
    views.v = tensor_view(next());
  }
  return views;
}

}  // namespace jax_flash_attn::ffi
