#include "ffi/buffers.h"

#include <cstdint>
#include <string>

namespace jax_flash_attn::ffi {

using runtime::Status;
using xla::ffi::AnyBuffer;
using xla::ffi::DataType;

namespace {

jfa::TensorView view_at(const AnyBuffer& buffer, std::int64_t parts, int part) {
  const auto dims = buffer.dimensions();
  const std::int64_t head_dim = dims[dims.size() - 1];
  const std::int64_t row = dims[dims.size() - 2] * head_dim;
  auto* data = static_cast<std::uint16_t*>(buffer.untyped_data());
  // A buffer without elements has no address to step from.
  if (data != nullptr) data += part * row;
  return {data, dims[1] * parts * row, static_cast<int>(parts * row), static_cast<int>(head_dim),
          static_cast<int>(dims[0] > 0 ? dims[0] : 1)};
}

// Stands in for a buffer that a malformed call lacks, until finish() reports it.
AnyBuffer no_buffer() {
  static std::int64_t dims[5] = {0, 0, 0, 0, 0};
  static XLA_FFI_Buffer buffer = [] {
    XLA_FFI_Buffer empty{};
    empty.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    empty.dtype = XLA_FFI_DataType_BF16;
    empty.rank = 5;
    empty.dims = dims;
    return empty;
  }();
  return AnyBuffer(&buffer);
}

}  // namespace

AnyBuffer BufferReader::next_argument() {
  const auto buffer = args_.get<AnyBuffer>(next_argument_++);
  if (buffer.has_value() && buffer->dimensions().size() >= 2) return *buffer;
  missing_ = true;
  return no_buffer();
}

AnyBuffer BufferReader::next_result() {
  auto buffer = rets_.get<AnyBuffer>(next_result_++);
  if (buffer.has_value() && (*buffer)->dimensions().size() >= 2) return **buffer;
  missing_ = true;
  return no_buffer();
}

Status BufferReader::finish() const {
  if (!missing_ && next_argument_ == args_.size() && next_result_ == rets_.size()) return Status();
  return Status::invalid_argument("A flash attention call has " + std::to_string(args_.size()) +
                                  " operands and " + std::to_string(rets_.size()) +
                                  " results, which do not fit its attributes.");
}

jfa::TensorView tensor_view(const AnyBuffer& buffer) { return view_at(buffer, 1, 0); }

jfa::TensorView packed_view(const AnyBuffer& buffer, int part) {
  return view_at(buffer, buffer.dimensions()[2], part);
}

jfa::HeadValues head_values(const AnyBuffer& buffer) {
  return {buffer.untyped_data(), static_cast<int>(batch_of(buffer))};
}

std::int64_t batch_of(const AnyBuffer& buffer) {
  const std::int64_t batch = buffer.dimensions()[0];
  return batch > 0 ? batch : 1;
}

runtime::StatusOr<launchers::Element> element_of(DataType dtype) {
  if (dtype == DataType::BF16) return launchers::Element::kBFloat16;
  if (dtype == DataType::F16) return launchers::Element::kFloat16;
  return Status::unimplemented("flash attention kernels take bfloat16 and float16.");
}

Status check_alignment(const jfa::TensorView& view, const char* name) {
  if (reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0) return Status();
  return Status::invalid_argument(std::string(name) +
                                  " does not lie at a multiple of 16 bytes. Please report the "
                                  "program; implementation=\"jax\" works around it.");
}

}  // namespace jax_flash_attn::ffi
