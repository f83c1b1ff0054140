// SourceTree: the device sources, held in memory.
//
// NVRTC gets every file as a named header, so that compiling reads no file and `#include
// <sm80/forward.cuh>` means the same on every machine; the cache key covers all of the text.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/status.h"

namespace jax_flash_attn::runtime {

struct SourceTree {
  struct File {
    std::string name;  // relative to the kernel directory, with '/': "sm80/forward.cuh"
    std::string text;
  };
  std::vector<File> files;  // every .h and .cuh, sorted by name
  std::string hash;         // SHA-256 over names and texts, in hex
};

// The files under Settings::kernel_directory. Read once per process and directory: an edited kernel
// source takes effect in the next process. kFailedPrecondition names a directory that is missing,
// empty or unreadable; failures are not remembered. Thread-safe.
StatusOr<std::shared_ptr<const SourceTree>> source_tree();

}  // namespace jax_flash_attn::runtime
