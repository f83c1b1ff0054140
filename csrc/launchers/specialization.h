// From a call to the kernels that compute it: the architecture to compile for, the Config text, the
// launch facts that depend on the tiles. Needs no GPU.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "launchers/attention_spec.h"
#include "launchers/target.h"
#include "launchers/tile_override.h"
#include "runtime/compiler.h"
#include "runtime/status.h"

namespace jax_flash_attn::launchers {

// One kernel of an operation.
struct KernelSpecialization {
  runtime::CompileRequest request;
  std::string entry;
  int threads;
  int shared_bytes;
  // It may start before the kernel ahead of it has ended, for which it waits by itself.
  bool starts_early = false;
  int cluster_ctas = 1;  // that work together
};

// kSm90Split: a backward whose dq has a kernel of its own. kSm90Head: one whose CTAs take whole
// heads. kSm90Cluster: one whose CTAs work together.
enum class Family { kSm80, kSm90, kSm90Split, kSm90Head, kSm90Cluster };

struct ForwardSpecialization {
  Family family;
  std::string tiles;  // as explain() prints them
  int tile_q;
  int tile_k;
  KernelSpecialization main;
};

struct BackwardSpecialization {
  Family family = Family::kSm80;
  std::string tiles;
  int tile_q = 0;
  int tile_k = 0;
  // The preprocess kernel; of kSm90Split, that of dq; of kSm90Head there is none.
  std::optional<KernelSpecialization> first;
  KernelSpecialization main;
  std::optional<KernelSpecialization> postprocess;
  int dq_tile_q = 0;  // of kSm90Split's dq
  int dq_tile_k = 0;
  // Of kSm90: how many rows of other heads a warp of the main kernel prepares at a time, 0 where it
  // serves none.
  int prepared_rows = 0;
  // Of kSm90Head: how many query tiles of a key head fit.
  int head_tiles = 0;

  std::vector<KernelSpecialization> kernels() const;
};

// The target for a device's compute capability: the newest architecture of the same major version
// that both the device and NVRTC know.
runtime::StatusOr<Target> device_target(int compute_capability, int shared_bytes,
                                        int multiprocessors);
// The target for an architecture that is only named ("sm_90").
runtime::StatusOr<Target> named_target(const std::string& architecture);

// `forced`: the family and the tiles, where they are not for the tables to choose.
runtime::StatusOr<ForwardSpecialization> specialize_forward(
    const AttentionSpec& spec, const AttentionShape& shape, const Target& target,
    const std::optional<TileOverride>& forced);
runtime::StatusOr<BackwardSpecialization> specialize_backward(
    const AttentionSpec& spec, const AttentionShape& shape, const Target& target,
    const std::optional<TileOverride>& forced);

}  // namespace jax_flash_attn::launchers
