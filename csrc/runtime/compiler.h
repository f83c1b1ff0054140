// compile(): device source text in, cubin out, by NVRTC and without a file.
//
// Only real architectures (sm_90, not compute_90) are compiled for: PTX of a compiler newer than
// the driver cannot be loaded, machine code of the same CUDA major version can.
#pragma once

#include <string>
#include <vector>

#include "runtime/status.h"

namespace jax_flash_attn::runtime {

struct CompileRequest {
  std::string source;        // a Config, the #include of a kernel, and an extern "C" entry
  std::string architecture;  // "sm_80", "sm_90a", "sm_100f"
};

struct CompileResult {
  std::string cubin;
  std::string log;  // diagnostics and what ptxas -v prints
  double seconds;   // spent in NVRTC
};

// Registers and memory as ptxas reports them: the maximum over the program's functions.
struct ResourceUsage {
  int registers = 0;
  int spill_store_bytes = 0;
  int spill_load_bytes = 0;
  int stack_bytes = 0;
  std::vector<std::string> warnings;  // compiler warnings, and ptxas notes C75xx (serialised wgmma)
};

// Compiles a program whose includes resolve to source_tree(). Needs neither driver nor GPU. Threads
// compile in parallel. With Settings::dump_directory set, <architecture>-<hash>.{cu,log,cubin} are
// written there. kInvalidArgument: no real architecture; kFailedPrecondition: no NVRTC, no sources;
// kInternal: the source does not compile (the message carries the log and the dumped source's
// path).
StatusOr<CompileResult> compile(const CompileRequest& request);

// The options compile() passes for an architecture, under the settings in force.
std::vector<std::string> compile_options(const std::string& architecture);

// The architectures this NVRTC compiles for, as compute capabilities (80, 90, 100), ascending.
StatusOr<std::vector<int>> supported_architectures();

// Reads CompileResult::log.
ResourceUsage parse_resource_usage(const std::string& log);

}  // namespace jax_flash_attn::runtime
