// The CUDA devices this process sees, and the facts a launch is planned from.
#pragma once

#include <string>
#include <vector>

#include "runtime/status.h"

namespace jax_flash_attn::runtime {

struct DeviceInfo {
  int ordinal;             // the driver's, after CUDA_VISIBLE_DEVICES
  int compute_capability;  // 10 * major + minor: 90
  int multiprocessors;     // those usable here: fewer than the chip's under MIG
  int shared_bytes_per_block_optin;
  int shared_bytes_per_multiprocessor;
  std::string name;
};

// A device's facts, read on the first call and valid for the life of the process. kInvalidArgument
// for an ordinal that does not exist; driver()'s failures. Thread-safe; cheap after the first call.
StatusOr<const DeviceInfo*> device_info(int ordinal);

// The ordinal of the calling thread's current context. kFailedPrecondition where there is none.
StatusOr<int> current_device();

// Every device, by ordinal.
StatusOr<std::vector<DeviceInfo>> all_devices();

}  // namespace jax_flash_attn::runtime
