// From a call to the kernels that compute it: the architecture to compile for, the Config text, the
// launch facts that depend on the tiles. Needs no GPU.
#pragma once

#include <string>
#include <vector>

#include "launchers/attention_spec.h"
#include "launchers/sm80_tiles.h"
#include "launchers/target.h"
#include "runtime/compiler.h"
#include "runtime/status.h"

namespace jax_flash_attn::launchers {

// One kernel of an operation.
struct KernelSpecialization {
  runtime::CompileRequest request;
  std::string entry;
  int threads;
  int shared_bytes;
};

struct ForwardSpecialization {
  ForwardTiles tiles;
  KernelSpecialization main;
};

struct BackwardSpecialization {
  BackwardTiles tiles;
  KernelSpecialization preprocess;
  KernelSpecialization main;
  KernelSpecialization postprocess;
};

// The target for a device's compute capability: the newest architecture of the same major version
// that both the device and NVRTC know.
runtime::StatusOr<Target> device_target(int compute_capability, int shared_bytes);
// The target for an architecture that is only named ("sm_90").
runtime::StatusOr<Target> named_target(const std::string& architecture);

runtime::StatusOr<ForwardSpecialization> specialize_forward(const AttentionSpec& spec,
                                                            const AttentionShape& shape,
                                                            const Target& target);
runtime::StatusOr<BackwardSpecialization> specialize_backward(const AttentionSpec& spec,
                                                              const AttentionShape& shape,
                                                              const Target& target);

// Tiles as explain() prints them.
std::string describe(const ForwardTiles& tiles);
std::string describe(const BackwardTiles& tiles);

}  // namespace jax_flash_attn::launchers
