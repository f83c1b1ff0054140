// Settings: everything the runtime takes from its surroundings.
//
// Python reads the environment and the package's location once, at import, and calls configure().
// The C++ side reads no environment variable but CUDA_HOME and CUDA_PATH (nvrtc_api.cc).
#pragma once

#include <string>
#include <vector>

namespace jax_flash_attn::runtime {

struct Settings {
  std::string kernel_directory;                // root of the device sources
  std::string cache_directory;                 // compiled kernels; empty: no disk cache
  std::string nvrtc_path;                      // libnvrtc to use; empty: search for one
  std::vector<std::string> nvrtc_directories;  // where to look for libnvrtc.so.<major>
  std::string dump_directory;                  // source, cubin and log go here; empty: no dump
  std::string version;                         // of this library; part of the disk cache's key
};

// Replaces the settings. Meant to be called once, before any other function of the runtime:
// libraries and kernels loaded under earlier settings stay. Thread-safe.
void configure(Settings settings);

// The settings in force; empty ones before configure(). Thread-safe; the reference stays valid for
// the life of the process.
const Settings& settings();

}  // namespace jax_flash_attn::runtime
