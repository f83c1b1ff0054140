// launch(): a kernel of ours onto a stream.
#pragma once

#include "runtime/driver_api.h"
#include "runtime/kernel_cache.h"
#include "runtime/status.h"

namespace jax_flash_attn::runtime {

struct LaunchShape {
  unsigned grid_x;
  unsigned grid_y;
  unsigned grid_z;
  unsigned block_x;  // threads per CTA
  int shared_bytes;  // dynamic; at most the kernel's
  // The kernel may start before the one ahead of it in the stream has ended, and waits for its
  // results itself (griddepcontrol.wait).
  bool programmatic_serialization = false;
  unsigned cluster_x = 1;  // CTAs per cluster; divides grid_x, at most 8
};

// Enqueues a kernel whose one argument is a `const __grid_constant__ Params`; `params` points to it
// and is copied before the call returns. Does not synchronise, allocate or load, so it may be
// captured. The stream must belong to the context that is current and the kernel to its device.
Status launch(const Kernel& kernel, const LaunchShape& shape, CUstream stream, const void* params);

// How many clusters of that shape run at one time on the kernel's device, if nothing else does. A
// cluster lies on neighbouring multiprocessors, of which some are left over, and how many differs
// from one GPU to the next. Needs: a context of the device that is current.
StatusOr<int> max_active_clusters(const Kernel& kernel, const LaunchShape& shape);

}  // namespace jax_flash_attn::runtime
