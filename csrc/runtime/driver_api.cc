#include "runtime/driver_api.h"

#include <dlfcn.h>

#include <string>

#include "runtime/single_flight.h"

namespace jax_flash_attn::runtime {
namespace {

// cuLibraryLoadData and cuLaunchKernelEx with a context-free kernel came with CUDA 12.0.
constexpr int kOldestCudaVersion = 12000;

using GetProcAddress = CUresult (*)(const char* symbol, void** address, int cuda_version,
                                    std::uint64_t flags, int* symbol_status);

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

template <typename Function>
Function symbol(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

// Never closed, so that the functions stay valid; opening it again only counts a reference.
void* open_driver_library() { return dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); }

// Fetches functions through cuGetProcAddress and remembers the first one that is missing.
class FunctionTable {
 public:
  explicit FunctionTable(GetProcAddress get_proc_address) : get_proc_address_(get_proc_address) {}

  template <typename Function>
  void fetch(const char* name, Function*& function) {
    void* address = nullptr;
    int symbol_status = 0;
    const CUresult result =
        get_proc_address_(name, &address, kOldestCudaVersion, /*flags=*/0, &symbol_status);
    if (result != CUDA_SUCCESS || address == nullptr) {
      if (missing_.empty()) missing_ = name;
      return;
    }
    function = reinterpret_cast<Function*>(address);
  }

  const std::string& missing() const { return missing_; }

 private:
  GetProcAddress get_proc_address_;
  std::string missing_;
};

void fetch_all(FunctionTable& table, DriverApi& api) {
  table.fetch("cuInit", api.cuInit);
  table.fetch("cuDriverGetVersion", api.cuDriverGetVersion);
  table.fetch("cuGetErrorName", api.cuGetErrorName);
  table.fetch("cuGetErrorString", api.cuGetErrorString);
  table.fetch("cuDeviceGetCount", api.cuDeviceGetCount);
  table.fetch("cuDeviceGet", api.cuDeviceGet);
  table.fetch("cuDeviceGetName", api.cuDeviceGetName);
  table.fetch("cuDeviceGetAttribute", api.cuDeviceGetAttribute);
  table.fetch("cuCtxGetCurrent", api.cuCtxGetCurrent);
  table.fetch("cuCtxGetDevice", api.cuCtxGetDevice);
  table.fetch("cuCtxPushCurrent", api.cuCtxPushCurrent);
  table.fetch("cuCtxPopCurrent", api.cuCtxPopCurrent);
  table.fetch("cuStreamGetCtx", api.cuStreamGetCtx);
  table.fetch("cuStreamIsCapturing", api.cuStreamIsCapturing);
  table.fetch("cuLibraryLoadData", api.cuLibraryLoadData);
  table.fetch("cuLibraryGetKernel", api.cuLibraryGetKernel);
  table.fetch("cuKernelGetFunction", api.cuKernelGetFunction);
  table.fetch("cuKernelSetAttribute", api.cuKernelSetAttribute);
  table.fetch("cuFuncGetAttribute", api.cuFuncGetAttribute);
  table.fetch("cuFuncSetAttribute", api.cuFuncSetAttribute);
  table.fetch("cuLaunchKernelEx", api.cuLaunchKernelEx);
  table.fetch("cuOccupancyMaxActiveBlocksPerMultiprocessor",
              api.cuOccupancyMaxActiveBlocksPerMultiprocessor);
  table.fetch("cuOccupancyMaxActiveClusters", api.cuOccupancyMaxActiveClusters);
  table.fetch("cuTensorMapEncodeTiled", api.cuTensorMapEncodeTiled);
  table.fetch("cuMemsetD8Async", api.cuMemsetD8Async);
  table.fetch("cuMemsetD32Async", api.cuMemsetD32Async);
}

StatusOr<DriverApi> load_driver() {
  void* const library = open_driver_library();
  if (library == nullptr) {
    return Status::failed_precondition(
        "libcuda.so.1 could not be loaded, so there is no NVIDIA driver to run kernels with: "
        "install "
        "the driver, or give the container access to the GPU.");
  }
  const int version = driver_version().value_or(0);
  const auto get_proc_address = symbol<GetProcAddress>(library, "cuGetProcAddress_v2");
  if (version < kOldestCudaVersion || get_proc_address == nullptr) {
    return Status::failed_precondition("The NVIDIA driver is too old: it supports CUDA " +
                                       version_text(version) +
                                       " and CUDA 12.0 or later is needed (driver 525 or later).");
  }
  DriverApi api = {};
  api.version = version;
  FunctionTable table(get_proc_address);
  fetch_all(table, api);
  if (!table.missing().empty()) {
    return Status::failed_precondition("The NVIDIA driver (CUDA " + version_text(version) +
                                       ") lacks " + table.missing() +
                                       ": reinstall or update the driver.");
  }
  if (const CUresult result = api.cuInit(0); result != CUDA_SUCCESS) {
    const char* name = nullptr;
    api.cuGetErrorName(result, &name);
    return Status::failed_precondition(
        std::string("cuInit failed with ") + (name != nullptr ? name : "an unknown error") +
        ": check that nvidia-smi lists a GPU and that CUDA_VISIBLE_DEVICES names one.");
  }
  return api;
}

SingleFlight<DriverApi>& driver_flight() {
  // Leaked: other threads may still use the driver while the process ends.
  static auto& flight = *new SingleFlight<DriverApi>();
  return flight;
}

}  // namespace

StatusOr<const DriverApi*> driver() { return driver_flight().get(load_driver); }

std::optional<int> driver_version() {
  void* const library = open_driver_library();
  if (library == nullptr) return std::nullopt;
  const auto get_version = symbol<CUresult (*)(int*)>(library, "cuDriverGetVersion");
  int version = 0;
  if (get_version == nullptr || get_version(&version) != CUDA_SUCCESS) return std::nullopt;
  return version;
}

Status driver_error(CUresult result, const char* operation) {
  if (result == CUDA_SUCCESS) return Status();
  const char* name = nullptr;
  const char* description = nullptr;
  if (const DriverApi* api = driver_flight().ready()) {
    api->cuGetErrorName(result, &name);
    api->cuGetErrorString(result, &description);
  }
  std::string message = std::string(operation) + " failed: " +
                        (name != nullptr ? name : "CUDA error " + std::to_string(result)) +
                        (description != nullptr ? std::string(" (") + description + ")" : "") + ".";
  if (result != CUDA_ERROR_OUT_OF_MEMORY) return Status::internal(std::move(message));
  message +=
      " Kernel code and stacks live outside XLA's memory pool: lower "
      "XLA_PYTHON_CLIENT_MEM_FRACTION "
      "(0.75 by default) so that the pool leaves room for them.";
  return Status::resource_exhausted(std::move(message));
}

}  // namespace jax_flash_attn::runtime
