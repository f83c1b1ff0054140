#include "launchers/tensor_maps.h"

#include <cstring>

#include "runtime/tensor_map.h"

namespace jax_flash_attn::launchers {

using runtime::Status;

Status fill_tensor_map(jfa::TensorMap& map, const jfa::TensorView& view, std::int64_t seqlen,
                       std::int64_t heads, std::int64_t head_dim, int rows) {
  if (seqlen == 0) return Status();
  const auto bytes = [](long long elements) { return static_cast<std::uint64_t>(elements) * 2; };
  JFA_ASSIGN_OR_RETURN(
      const runtime::CUtensorMap encoded,
      runtime::encode_tensor_map(
          {view.data,
           {static_cast<std::uint64_t>(head_dim), static_cast<std::uint64_t>(seqlen),
            static_cast<std::uint64_t>(heads), static_cast<std::uint64_t>(view.batches)},
           {bytes(view.row_stride), bytes(view.head_stride), bytes(view.batch_stride)},
           64,
           static_cast<std::uint32_t>(rows)}));
  static_assert(sizeof(map) == sizeof(encoded), "both are the driver's 128 bytes");
  std::memcpy(&map, &encoded, sizeof(map));
  return Status();
}

}  // namespace jax_flash_attn::launchers
