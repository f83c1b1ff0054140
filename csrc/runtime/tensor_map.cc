#include "runtime/tensor_map.h"

#include <algorithm>
#include <iterator>

namespace jax_flash_attn::runtime {
namespace {

bool equal(const TensorBoxes& a, const TensorBoxes& b) {
  return a.address == b.address && std::equal(std::begin(a.dims), std::end(a.dims), b.dims) &&
         std::equal(std::begin(a.stride_bytes), std::end(a.stride_bytes), b.stride_bytes) &&
         a.box_columns == b.box_columns && a.box_rows == b.box_rows;
}

StatusOr<CUtensorMap> encode(const TensorBoxes& boxes) {
  JFA_ASSIGN_OR_RETURN(const DriverApi* cuda, driver());
  const std::uint32_t box[4] = {boxes.box_columns, boxes.box_rows, 1, 1};
  const std::uint32_t element_strides[4] = {1, 1, 1, 1};
  CUtensorMap map{};
  JFA_RETURN_IF_ERROR(driver_error(
      cuda->cuTensorMapEncodeTiled(
          &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, boxes.address, boxes.dims, boxes.stride_bytes,
          box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
      "cuTensorMapEncodeTiled"));
  return map;
}

// The last map of each slot, for one thread: no lock. XLA's buffers keep their addresses from run
// to run, and a map says nothing but what the boxes say, so that it never goes stale.
struct Slot {
  TensorBoxes boxes;  // its address is null where the slot is empty
  CUtensorMap map;
};
constexpr std::size_t kSlots = 128;
thread_local Slot slots[kSlots] = {};

Slot& slot_of(const TensorBoxes& boxes) {
  // XLA's buffers start on multiples of 256 bytes; packed slices lie a few rows apart.
  const auto address = reinterpret_cast<std::uintptr_t>(boxes.address);
  return slots[(address / 256 + address / 65536 + boxes.box_rows) % kSlots];
}

}  // namespace

StatusOr<CUtensorMap> encode_tensor_map(const TensorBoxes& boxes) {
  Slot& slot = slot_of(boxes);
  if (!equal(slot.boxes, boxes)) {
    JFA_ASSIGN_OR_RETURN(slot.map, encode(boxes));
    slot.boxes = boxes;
  }
  return slot.map;
}

}  // namespace jax_flash_attn::runtime
