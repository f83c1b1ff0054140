#include "runtime/tensor_map.h"

namespace jax_flash_attn::runtime {

StatusOr<CUtensorMap> encode_tensor_map(const TensorBoxes& boxes) {
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

}  // namespace jax_flash_attn::runtime
