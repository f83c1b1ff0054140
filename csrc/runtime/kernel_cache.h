// KernelCache: from a compile request to a function that can be launched.
//
// A request is compiled, or read from the disk cache, once per process and loaded once; a function
// is fetched once per device. Whatever the cache has handed out stays valid until the process ends:
// nothing is ever unloaded.
//
// Concurrency: every member may be called from any thread. Callers that ask for the same kernel
// while one thread makes it wait and share the outcome; a failure is not remembered. No lock is
// held while NVRTC or the driver works, so different requests compile in parallel. A kernel that is
// there costs two lookups under shared locks and no allocation.
#pragma once

#include <map>
#include <memory>
#include <shared_mutex>
#include <string>
#include <tuple>

#include "runtime/compiler.h"
#include "runtime/driver_api.h"
#include "runtime/status.h"

namespace jax_flash_attn::runtime {

struct Kernel {
  CUfunction function;
  int shared_bytes;  // dynamic, per CTA
  int registers;     // per thread
  int local_bytes;   // per thread: spills and stack
};

struct CubinInfo {
  std::string cubin;
  bool from_disk;
  double seconds;   // spent in NVRTC; 0 where from_disk
  std::string log;  // the compiler's; empty where from_disk
};

class KernelCache {
 public:
  KernelCache();
  ~KernelCache();

  // The kernel with the extern "C" name `entry`, ready to launch on a device with up to
  // `dynamic_shared_bytes`. The device's context must be current. Compiles and loads where needed,
  // so call it outside stream capture (find() says whether it would). Errors: those of cubin() and
  // driver(); kInvalidArgument where the device has less shared memory; kFailedPrecondition where
  // another device's context is current; kResourceExhausted, kInternal.
  StatusOr<const Kernel*> get(const CompileRequest& request, const std::string& entry,
                              int device_ordinal, int dynamic_shared_bytes);

  // The kernel get() would return, if it is there already, else null. Never compiles or loads.
  const Kernel* find(const CompileRequest& request, const std::string& entry, int device_ordinal,
                     int dynamic_shared_bytes);

  // The request's cubin, from this process, the disk or NVRTC. Needs NVRTC in any case (its version
  // is in the key) but no GPU. With Settings::dump_directory set the disk is not read, so that
  // every kernel a process uses is dumped. Errors: those of compile().
  StatusOr<CubinInfo> cubin(const CompileRequest& request);

 private:
  struct Program;

  Program& program(const CompileRequest& request);

  std::shared_mutex mutex_;  // guards the map, not the programs
  std::map<std::tuple<std::string, std::string>, std::unique_ptr<Program>, std::less<>> programs_;
};

// The process's cache. Never destroyed: other threads may still launch while the process ends.
KernelCache& kernel_cache();

}  // namespace jax_flash_attn::runtime
