// Tensor maps of a call's tensors.
#pragma once

#include <params/tensor_map.h>
#include <params/tensor_view.h>

#include <cstdint>

#include "runtime/status.h"

namespace jax_flash_attn::launchers {

// Boxes of 64 columns x `rows` rows of a tensor, one head of one batch entry at a time.
// Of a tensor without rows no map can be made, and none is used: it stays as it is.
// Needs: no other extent is 0.
runtime::Status fill_tensor_map(jfa::TensorMap& map, const jfa::TensorView& view,
                                std::int64_t seqlen, std::int64_t heads, std::int64_t head_dim,
                                int rows);

}  // namespace jax_flash_attn::launchers
