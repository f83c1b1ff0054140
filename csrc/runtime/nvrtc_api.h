// NVRTC, the run-time compiler, found on this machine and reached through dlopen.
//
// Search order: Settings::nvrtc_path, and nothing else where that is set; a libnvrtc the process
// has loaded already (JAX's CUDA plugin loads one); Settings::nvrtc_directories; the loader's own
// search; $CUDA_HOME/lib64 and $CUDA_PATH/lib64. A cubin needs a driver of the compiler's major
// version or later, so a libnvrtc newer than the driver's major is passed over.
#pragma once

#include <cstddef>
#include <string>

#include "runtime/status.h"

namespace jax_flash_attn::runtime {

using nvrtcProgram = struct _nvrtcProgram*;

enum nvrtcResult : int {
  NVRTC_SUCCESS = 0,
};

struct NvrtcApi {
  std::string path;  // of the loaded library
  int major;
  int minor;

  nvrtcResult (*nvrtcVersion)(int* major, int* minor);
  const char* (*nvrtcGetErrorString)(nvrtcResult result);
  nvrtcResult (*nvrtcGetNumSupportedArchs)(int* count);
  nvrtcResult (*nvrtcGetSupportedArchs)(int* architectures);
  nvrtcResult (*nvrtcCreateProgram)(nvrtcProgram* program, const char* source, const char* name,
                                    int num_headers, const char* const* headers,
                                    const char* const* include_names);
  nvrtcResult (*nvrtcDestroyProgram)(nvrtcProgram* program);
  nvrtcResult (*nvrtcCompileProgram)(nvrtcProgram program, int num_options,
                                     const char* const* options);
  nvrtcResult (*nvrtcGetCUBINSize)(nvrtcProgram program, std::size_t* bytes);
  nvrtcResult (*nvrtcGetCUBIN)(nvrtcProgram program, char* cubin);
  nvrtcResult (*nvrtcGetProgramLogSize)(nvrtcProgram program, std::size_t* bytes_with_terminator);
  nvrtcResult (*nvrtcGetProgramLog)(nvrtcProgram program, char* log);
};

// The compiler, loaded on the first call that finds one of version 12.3 or later. Success is
// remembered, a failure is not, so that installing NVRTC helps a running process.
// kFailedPrecondition lists the places looked at and names the package to install. Thread-safe;
// needs neither driver nor GPU; one atomic load once loaded.
StatusOr<const NvrtcApi*> nvrtc();

}  // namespace jax_flash_attn::runtime
