// A tensor as the copy engine sees it: opaque, encoded by the driver (runtime/tensor_map.h).
#pragma once

namespace jfa {

struct alignas(64) TensorMap {
  unsigned long long words[16];
};

}  // namespace jfa
