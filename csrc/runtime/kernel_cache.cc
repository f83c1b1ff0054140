#include "runtime/kernel_cache.h"

#include <functional>
#include <mutex>
#include <string_view>
#include <utility>

#include "runtime/device.h"
#include "runtime/disk_cache.h"
#include "runtime/nvrtc_api.h"
#include "runtime/settings.h"
#include "runtime/sha256.h"
#include "runtime/single_flight.h"
#include "runtime/source_tree.h"

namespace jax_flash_attn::runtime {
namespace {

// The value under `key`, default-made on first use. Its address stays. Looking up a present key
// takes a shared lock and builds no string.
template <typename Map, typename KeyView>
typename Map::mapped_type::element_type& find_or_make(Map& map, std::shared_mutex& mutex,
                                                      const KeyView& key) {
  {
    std::shared_lock<std::shared_mutex> lock(mutex);
    if (const auto found = map.find(key); found != map.end()) return *found->second;
  }
  std::unique_lock<std::shared_mutex> lock(mutex);
  auto& value = map[typename Map::key_type(key)];
  if (value == nullptr) {
    value = std::make_unique<typename Map::mapped_type::element_type>();
  }
  return *value;
}

// Everything that decides the bytes of the cubin.
StatusOr<std::string> disk_key(const CompileRequest& request) {
  JFA_ASSIGN_OR_RETURN(const NvrtcApi* api, nvrtc());
  JFA_ASSIGN_OR_RETURN(const std::shared_ptr<const SourceTree> tree, source_tree());
  Sha256 digest;
  digest.update_field(settings().version);
  digest.update_field(std::to_string(api->major) + "." + std::to_string(api->minor));
  digest.update_field(tree->hash);
  digest.update_field(request.source);
  digest.update_field(request.architecture);
  for (const std::string& option : compile_options(request.architecture)) {
    digest.update_field(option);
  }
  return digest.finish_hex();
}

StatusOr<CubinInfo> make_cubin(const CompileRequest& request) {
  JFA_ASSIGN_OR_RETURN(const std::string key, disk_key(request));
  const bool is_dumping = !settings().dump_directory.empty();
  if (!is_dumping) {
    if (auto stored = lookup(key)) return CubinInfo{std::move(*stored), true, 0.0, ""};
  }
  JFA_ASSIGN_OR_RETURN(CompileResult compiled, compile(request));
  publish(key, compiled.cubin);
  return CubinInfo{std::move(compiled.cubin), false, compiled.seconds, std::move(compiled.log)};
}

StatusOr<CUlibrary> load_library(const std::string& cubin) {
  JFA_ASSIGN_OR_RETURN(const DriverApi* cuda, driver());
  CUlibrary library = nullptr;
  const CUresult result =
      cuda->cuLibraryLoadData(&library, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  JFA_RETURN_IF_ERROR(driver_error(result, "Loading a compiled kernel (cuLibraryLoadData)"));
  return library;
}

Status check_shared_bytes(const std::string& entry, int device_ordinal, int dynamic_shared_bytes) {
  JFA_ASSIGN_OR_RETURN(const DeviceInfo* device, device_info(device_ordinal));
  if (dynamic_shared_bytes <= device->shared_bytes_per_block_optin) return Status();
  return Status::invalid_argument(
      "Kernel " + entry + " asks for " + std::to_string(dynamic_shared_bytes) +
      " bytes of shared memory per CTA; " + device->name + " has " +
      std::to_string(device->shared_bytes_per_block_optin) + ". Choose smaller tiles.");
}

Status check_current_device(int device_ordinal) {
  JFA_ASSIGN_OR_RETURN(const int current, current_device());
  if (current == device_ordinal) return Status();
  return Status::failed_precondition(
      "A kernel was asked for on device " + std::to_string(device_ordinal) + " while device " +
      std::to_string(current) + " is current: make the stream's context current first.");
}

StatusOr<int> function_attribute(const DriverApi& cuda, CUfunction function,
                                 CUfunction_attribute name) {
  int value = 0;
  JFA_RETURN_IF_ERROR(
      driver_error(cuda.cuFuncGetAttribute(&value, name, function), "cuFuncGetAttribute"));
  return value;
}

}  // namespace

// One request: its cubin, its loaded library, and the functions fetched from it.
struct KernelCache::Program {
  using KernelKey = std::tuple<std::string, int, int>;  // entry, device, dynamic shared bytes

  StatusOr<Kernel> fetch_kernel(const CompileRequest& request, const std::string& entry,
                                int device_ordinal, int dynamic_shared_bytes);
  Status raise_shared_limit(const DriverApi& cuda, CUkernel kernel, int device_ordinal,
                            int dynamic_shared_bytes);

  SingleFlight<CubinInfo> cubin;
  SingleFlight<CUlibrary> library;

  std::shared_mutex kernels_mutex;
  std::map<KernelKey, std::unique_ptr<SingleFlight<Kernel>>, std::less<>> kernels;

  std::mutex shared_limits_mutex;
  std::map<std::pair<CUkernel, int>, int> shared_limits;
};

// A function has one limit per device: a kernel that asks for less must not lower it for one that
// asked for more.
Status KernelCache::Program::raise_shared_limit(const DriverApi& cuda, CUkernel kernel,
                                                int device_ordinal, int dynamic_shared_bytes) {
  std::lock_guard<std::mutex> lock(shared_limits_mutex);
  int& limit = shared_limits[{kernel, device_ordinal}];
  if (dynamic_shared_bytes <= limit) return Status();
  CUdevice device = 0;
  JFA_RETURN_IF_ERROR(driver_error(cuda.cuDeviceGet(&device, device_ordinal), "cuDeviceGet"));
  const CUresult result = cuda.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                    dynamic_shared_bytes, kernel, device);
  JFA_RETURN_IF_ERROR(
      driver_error(result, "Raising a kernel's shared memory limit (cuKernelSetAttribute)"));
  limit = dynamic_shared_bytes;
  return Status();
}

StatusOr<Kernel> KernelCache::Program::fetch_kernel(const CompileRequest& request,
                                                    const std::string& entry, int device_ordinal,
                                                    int dynamic_shared_bytes) {
  JFA_ASSIGN_OR_RETURN(const DriverApi* cuda, driver());
  JFA_RETURN_IF_ERROR(check_shared_bytes(entry, device_ordinal, dynamic_shared_bytes));
  JFA_RETURN_IF_ERROR(check_current_device(device_ordinal));
  JFA_ASSIGN_OR_RETURN(const CubinInfo* compiled, cubin.get([&] { return make_cubin(request); }));
  JFA_ASSIGN_OR_RETURN(const CUlibrary* loaded,
                       library.get([&] { return load_library(compiled->cubin); }));

  CUkernel handle = nullptr;
  JFA_RETURN_IF_ERROR(driver_error(cuda->cuLibraryGetKernel(&handle, *loaded, entry.c_str()),
                                   ("Finding kernel " + entry + " (cuLibraryGetKernel)").c_str()));
  JFA_RETURN_IF_ERROR(raise_shared_limit(*cuda, handle, device_ordinal, dynamic_shared_bytes));
  Kernel kernel = {};
  kernel.shared_bytes = dynamic_shared_bytes;
  // Loads the code into the context, which the first launch would do otherwise, under capture
  // perhaps.
  JFA_RETURN_IF_ERROR(driver_error(cuda->cuKernelGetFunction(&kernel.function, handle),
                                   ("Loading kernel " + entry + " (cuKernelGetFunction)").c_str()));
  JFA_ASSIGN_OR_RETURN(kernel.registers,
                       function_attribute(*cuda, kernel.function, CU_FUNC_ATTRIBUTE_NUM_REGS));
  JFA_ASSIGN_OR_RETURN(kernel.local_bytes, function_attribute(*cuda, kernel.function,
                                                              CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES));
  return kernel;
}

KernelCache::KernelCache() = default;
KernelCache::~KernelCache() = default;

KernelCache::Program& KernelCache::program(const CompileRequest& request) {
  return find_or_make(programs_, mutex_, std::tie(request.source, request.architecture));
}

StatusOr<const Kernel*> KernelCache::get(const CompileRequest& request, const std::string& entry,
                                         int device_ordinal, int dynamic_shared_bytes) {
  Program& wanted = program(request);
  SingleFlight<Kernel>& kernel = find_or_make(
      wanted.kernels, wanted.kernels_mutex, std::tie(entry, device_ordinal, dynamic_shared_bytes));
  return kernel.get(
      [&] { return wanted.fetch_kernel(request, entry, device_ordinal, dynamic_shared_bytes); });
}

const Kernel* KernelCache::find(const CompileRequest& request, const std::string& entry,
                                int device_ordinal, int dynamic_shared_bytes) {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  const auto wanted = programs_.find(std::tie(request.source, request.architecture));
  if (wanted == programs_.end()) return nullptr;
  std::shared_lock<std::shared_mutex> kernels_lock(wanted->second->kernels_mutex);
  const auto kernel =
      wanted->second->kernels.find(std::tie(entry, device_ordinal, dynamic_shared_bytes));
  return kernel == wanted->second->kernels.end() ? nullptr : kernel->second->ready();
}

StatusOr<CubinInfo> KernelCache::cubin(const CompileRequest& request) {
  JFA_ASSIGN_OR_RETURN(const CubinInfo* info,
                       program(request).cubin.get([&] { return make_cubin(request); }));
  return *info;
}

KernelCache& kernel_cache() {
  static auto& cache = *new KernelCache();
  return cache;
}

}  // namespace jax_flash_attn::runtime
