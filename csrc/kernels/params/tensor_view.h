// A (batch, row, head, head_dim) tensor as host and device see it: strides in elements, the head
// dimension contiguous. A tensor whose batch is smaller than the call's serves batch b with its own
// batch b % batches, so that an operand which vmap leaves unmapped is never copied.
#pragma once

namespace jfa {

struct TensorView {
  void* data;
  long long batch_stride;
  int row_stride;  // 32 bits, so that an address costs one wide multiply-add
  int head_stride;
  int batches;
};

// An array of one value (or one pair of words) for each (batch, head), shared over batches in the
// same way.
struct HeadValues {
  const void* data;
  int batches;
};

}  // namespace jfa
