#include "runtime/nvrtc_api.h"

#include <dlfcn.h>

#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

#include "runtime/driver_api.h"
#include "runtime/settings.h"
#include "runtime/single_flight.h"

namespace jax_flash_attn::runtime {
namespace {

// Earlier compilers serialise the wgmma of Hopper kernels (ptxas C7513).
constexpr int kOldestMajor = 12;
constexpr int kOldestMinor = 3;
// Tried first where no driver says which major version to prefer.
constexpr int kPreferredMajor = 13;

std::string version_text(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

// Tries libraries one by one and keeps the reason for passing over each of them.
class Search {
 public:
  // Loads the library that dlopen finds under `name`; with RTLD_NOLOAD in `extra_flags`, only one
  // that the process has loaded already, whose absence is no reason worth telling.
  bool try_library(const std::string& name, int extra_flags = 0) {
    void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | extra_flags);
    if (library == nullptr) {
      const char* const reason = dlerror();
      if ((extra_flags & RTLD_NOLOAD) == 0) reject(reason != nullptr ? reason : name.c_str());
      return false;
    }
    NvrtcApi api = {};
    if (const std::string flaw = examine(library, name, api); !flaw.empty()) {
      reject(flaw);
      dlclose(library);  // a later search must not find it as one that is loaded already
      return false;
    }
    preload_builtins(api);
    found_ = std::move(api);
    return true;
  }

  NvrtcApi take_found() { return std::move(*found_); }
  const std::string& rejected() const { return rejected_; }

 private:
  void reject(const std::string& reason) { rejected_ += "\n  " + reason; }

  template <typename Function>
  static bool fetch(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    return function != nullptr;
  }

  static bool fetch_all(void* library, NvrtcApi& api) {
    return fetch(library, "nvrtcVersion", api.nvrtcVersion) &&
           fetch(library, "nvrtcGetErrorString", api.nvrtcGetErrorString) &&
           fetch(library, "nvrtcGetNumSupportedArchs", api.nvrtcGetNumSupportedArchs) &&
           fetch(library, "nvrtcGetSupportedArchs", api.nvrtcGetSupportedArchs) &&
           fetch(library, "nvrtcCreateProgram", api.nvrtcCreateProgram) &&
           fetch(library, "nvrtcDestroyProgram", api.nvrtcDestroyProgram) &&
           fetch(library, "nvrtcCompileProgram", api.nvrtcCompileProgram) &&
           fetch(library, "nvrtcGetCUBINSize", api.nvrtcGetCUBINSize) &&
           fetch(library, "nvrtcGetCUBIN", api.nvrtcGetCUBIN) &&
           fetch(library, "nvrtcGetProgramLogSize", api.nvrtcGetProgramLogSize) &&
           fetch(library, "nvrtcGetProgramLog", api.nvrtcGetProgramLog);
  }

  // Fills `api`; returns why the library is of no use, or an empty text.
  static std::string examine(void* library, const std::string& name, NvrtcApi& api) {
    if (!fetch_all(library, api) || api.nvrtcVersion(&api.major, &api.minor) != NVRTC_SUCCESS) {
      return name + " lacks functions of NVRTC";
    }
    api.path = library_path(api, name);
    if (std::tie(api.major, api.minor) < std::tie(kOldestMajor, kOldestMinor)) {
      return api.path + " is version " + version_text(api.major, api.minor);
    }
    return "";
  }

  static std::string library_path(const NvrtcApi& api, const std::string& name) {
    Dl_info info = {};
    const bool is_known = dladdr(reinterpret_cast<void*>(api.nvrtcVersion), &info) != 0;
    return is_known && info.dli_fname != nullptr ? info.dli_fname : name;
  }

  // libnvrtc opens its builtins by soname while compiling. The wheels of CUDA 13.0 have no RPATH,
  // so that this fails unless the library is loaded already. Absent builtins are NVRTC's to report.
  static void preload_builtins(const NvrtcApi& api) {
    const std::size_t slash = api.path.rfind('/');
    if (slash == std::string::npos) return;
    const std::string builtins = api.path.substr(0, slash + 1) + "libnvrtc-builtins.so." +
                                 version_text(api.major, api.minor);
    dlopen(builtins.c_str(), RTLD_NOW | RTLD_LOCAL);
  }

  std::optional<NvrtcApi> found_;
  std::string rejected_;
};

// Major versions of which a driver runs the cubins, the preferred one first. A driver too old for
// this library has no say: kernels can still be compiled for another machine.
std::vector<int> usable_majors() {
  const int driver_major = driver_version().value_or(0) / 1000;
  std::vector<int> majors;
  for (int major = driver_major >= kOldestMajor ? driver_major : kPreferredMajor;
       major >= kOldestMajor; --major) {
    majors.push_back(major);
  }
  return majors;
}

std::vector<std::string> toolkit_directories() {
  std::vector<std::string> directories;
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    const char* const root = std::getenv(variable);
    if (root != nullptr && *root != '\0') directories.push_back(std::string(root) + "/lib64");
  }
  return directories;
}

bool search_everywhere(Search& search, const std::vector<int>& majors) {
  std::vector<std::string> names;
  for (int major : majors) names.push_back("libnvrtc.so." + std::to_string(major));
  const auto search_directories = [&](const std::vector<std::string>& directories) {
    for (const std::string& name : names) {
      for (const std::string& directory : directories) {
        if (search.try_library(directory + "/" + name)) return true;
      }
    }
    return false;
  };
  for (const std::string& name : names) {
    if (search.try_library(name, RTLD_NOLOAD)) return true;
  }
  if (search_directories(settings().nvrtc_directories)) return true;
  for (const std::string& name : names) {
    if (search.try_library(name)) return true;
  }
  return search_directories(toolkit_directories());
}

StatusOr<NvrtcApi> load_nvrtc() {
  constexpr char kInstall[] =
      "`pip install nvidia-cuda-nvrtc-cu12` (CUDA 12) or `pip install nvidia-cuda-nvrtc` (CUDA 13)";
  const std::string oldest = version_text(kOldestMajor, kOldestMinor);
  Search search;
  if (const std::string& path = settings().nvrtc_path; !path.empty()) {
    if (search.try_library(path)) return search.take_found();
    return Status::failed_precondition(
        "JAX_FLASH_ATTN_NVRTC_PATH must name a libnvrtc of version " + oldest +
        " or later; unset it, or install one with " + kInstall +
        ". Looked at:" + search.rejected());
  }
  const std::vector<int> majors = usable_majors();
  if (search_everywhere(search, majors)) return search.take_found();
  return Status::failed_precondition(
      "No usable NVRTC, CUDA's run-time compiler, was found. It must be of version " + oldest +
      " or later, and no newer than CUDA " + std::to_string(majors.front()) +
      ".x. Install it with " + kInstall +
      ", or set JAX_FLASH_ATTN_NVRTC_PATH to a libnvrtc. Looked at:" + search.rejected());
}

}  // namespace

StatusOr<const NvrtcApi*> nvrtc() {
  // Leaked: other threads may still compile while the process ends.
  static auto& flight = *new SingleFlight<NvrtcApi>();
  return flight.get(load_nvrtc);
}

}  // namespace jax_flash_attn::runtime
