// Disk cache of cubins: <cache directory>/<first two digits>/<other digits>.cubin
//
// No locks: an entry is written to a temporary file and renamed, and every read checks magic,
// length and digest, so that anything wrong is a miss. A cubin is code: a directory or entry that
// another user owns or may write is not used, neither read nor written. Errors never reach the
// caller.
#pragma once

#include <optional>
#include <string>

namespace jax_flash_attn::runtime {

struct DiskCacheStats {
  std::string directory;
  bool enabled;                 // entries are used; a missing directory is made when needed
  std::string reason_disabled;  // why not, with the remedy; empty where enabled
  int entries;
  long bytes;
};

// The payload published under a key (lowercase hex, as Sha256 makes it), or none. Thread-safe.
std::optional<std::string> lookup(const std::string& key_hex);

// Stores a payload under a key, or does nothing where that is not possible. Thread-safe, and safe
// against other processes and hosts.
void publish(const std::string& key_hex, const std::string& cubin);

// What is in the cache. Reads the whole directory: for diagnosis only.
DiskCacheStats disk_cache_stats();

}  // namespace jax_flash_attn::runtime
