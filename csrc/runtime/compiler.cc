#include "runtime/compiler.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <filesystem>
#include <memory>
#include <system_error>

#include "runtime/nvrtc_api.h"
#include "runtime/settings.h"
#include "runtime/sha256.h"
#include "runtime/source_tree.h"
#include "runtime/whole_file.h"

namespace jax_flash_attn::runtime {
namespace {

constexpr int kHashDigitsInFileName = 16;

// "sm_", digits, and at most one of the suffixes a and f.
bool is_real_architecture(const std::string& architecture) {
  const std::string prefix = "sm_";
  if (architecture.rfind(prefix, 0) != 0) return false;
  const std::size_t suffix = architecture.find_first_not_of("0123456789", prefix.size());
  if (suffix == prefix.size()) return false;
  return suffix == std::string::npos
             ? architecture.size() > prefix.size()
             : architecture.substr(suffix) == "a" || architecture.substr(suffix) == "f";
}

// Owns an nvrtcProgram.
class Program {
 public:
  Program(const NvrtcApi& api, nvrtcProgram handle) : api_(&api), handle_(handle) {}
  Program(Program&& other) noexcept : api_(other.api_), handle_(other.handle_) {
    other.handle_ = nullptr;
  }
  Program& operator=(Program&&) = delete;
  ~Program() {
    if (handle_ != nullptr) api_->nvrtcDestroyProgram(&handle_);
  }

  nvrtcProgram handle() const { return handle_; }

 private:
  const NvrtcApi* api_;
  nvrtcProgram handle_;
};

Status nvrtc_error(const NvrtcApi& api, nvrtcResult result, const std::string& operation) {
  return Status::internal(operation + " failed with " + api.nvrtcGetErrorString(result) +
                          " (NVRTC " + std::to_string(api.major) + "." + std::to_string(api.minor) +
                          ", " + api.path + ").");
}

StatusOr<Program> create_program(const NvrtcApi& api, const std::string& source) {
  JFA_ASSIGN_OR_RETURN(const std::shared_ptr<const SourceTree> tree, source_tree());
  std::vector<const char*> texts;
  std::vector<const char*> names;
  for (const SourceTree::File& file : tree->files) {
    texts.push_back(file.text.c_str());
    names.push_back(file.name.c_str());
  }
  nvrtcProgram handle = nullptr;
  const nvrtcResult result =
      api.nvrtcCreateProgram(&handle, source.c_str(), "kernel.cu", static_cast<int>(names.size()),
                             texts.data(), names.data());
  if (result != NVRTC_SUCCESS) return nvrtc_error(api, result, "nvrtcCreateProgram");
  return Program(api, handle);
}

nvrtcResult run_compiler(const NvrtcApi& api, nvrtcProgram program,
                         const std::string& architecture) {
  const std::vector<std::string> options = compile_options(architecture);
  std::vector<const char*> arguments;
  for (const std::string& option : options) arguments.push_back(option.c_str());
  return api.nvrtcCompileProgram(program, static_cast<int>(arguments.size()), arguments.data());
}

std::string program_log(const NvrtcApi& api, nvrtcProgram program) {
  std::size_t bytes = 0;
  if (api.nvrtcGetProgramLogSize(program, &bytes) != NVRTC_SUCCESS || bytes == 0) return "";
  std::string log(bytes, '\0');
  if (api.nvrtcGetProgramLog(program, log.data()) != NVRTC_SUCCESS) return "";
  log.resize(bytes - 1);  // NVRTC counts the terminating zero
  return log;
}

StatusOr<std::string> program_cubin(const NvrtcApi& api, nvrtcProgram program) {
  std::size_t bytes = 0;
  if (const nvrtcResult result = api.nvrtcGetCUBINSize(program, &bytes); result != NVRTC_SUCCESS) {
    return nvrtc_error(api, result, "nvrtcGetCUBINSize");
  }
  std::string cubin(bytes, '\0');
  if (const nvrtcResult result = api.nvrtcGetCUBIN(program, cubin.data());
      result != NVRTC_SUCCESS) {
    return nvrtc_error(api, result, "nvrtcGetCUBIN");
  }
  return cubin;
}

// Writes one file of a compilation into the dump directory. Returns its path; empty if dumping is
// off or the file cannot be written, which must not keep a kernel from running.
std::string dump(const CompileRequest& request, const char* extension, const std::string& content) {
  const std::string& directory = settings().dump_directory;
  if (directory.empty()) return "";
  std::error_code ignored;
  std::filesystem::create_directories(directory, ignored);
  Sha256 digest;
  digest.update(request.source);
  const std::string path = directory + "/" + request.architecture + "-" +
                           digest.finish_hex().substr(0, kHashDigitsInFileName) + extension;
  return write_whole_file(path, content) ? path : "";
}

Status compile_error(const NvrtcApi& api, nvrtcResult result, const CompileRequest& request,
                     const std::string& source_path, const std::string& log) {
  std::string message =
      nvrtc_error(api, result, "Compiling a kernel for " + request.architecture).message();
  if (log.find("--gpu-architecture") != std::string::npos) {
    message += " This NVRTC does not know the architecture: install one that does.";
  } else if (!source_path.empty()) {
    message += " The source is in " + source_path + ".";
  } else if (settings().dump_directory.empty()) {
    message += " Set JAX_FLASH_ATTN_DUMP_DIR to a directory to keep the source.";
  }
  return Status::internal(message + " Log:\n" + log);
}

// The number before `unit` in `line`, or 0: "8 bytes stack frame, 16 bytes spill stores".
int number_before(const std::string& line, const std::string& unit) {
  const std::size_t end = line.find(" " + unit);
  if (end == std::string::npos) return 0;
  std::size_t begin = end;
  while (begin > 0 && line[begin - 1] >= '0' && line[begin - 1] <= '9') --begin;
  int number = 0;
  std::from_chars(line.data() + begin, line.data() + end, number);
  return number;
}

bool is_warning(const std::string& line) {
  const bool is_remark =
      line.rfind("Remark:", 0) == 0;  // "The warnings can be suppressed with ..."
  return !is_remark &&
         (line.find("warning") != std::string::npos || line.find("(C75") != std::string::npos);
}

}  // namespace

StatusOr<CompileResult> compile(const CompileRequest& request) {
  if (!is_real_architecture(request.architecture)) {
    return Status::invalid_argument("Got architecture '" + request.architecture +
                                    "'; kernels are compiled for a real one, such as sm_90a.");
  }
  JFA_ASSIGN_OR_RETURN(const NvrtcApi* api, nvrtc());
  JFA_ASSIGN_OR_RETURN(const Program program, create_program(*api, request.source));
  const std::string source_path = dump(request, ".cu", request.source);

  const auto start = std::chrono::steady_clock::now();
  const nvrtcResult result = run_compiler(*api, program.handle(), request.architecture);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;

  CompileResult compiled;
  compiled.seconds = elapsed.count();
  compiled.log = program_log(*api, program.handle());
  dump(request, ".log", compiled.log);
  if (result != NVRTC_SUCCESS) {
    return compile_error(*api, result, request, source_path, compiled.log);
  }
  JFA_ASSIGN_OR_RETURN(compiled.cubin, program_cubin(*api, program.handle()));
  dump(request, ".cubin", compiled.cubin);
  return compiled;
}

std::vector<std::string> compile_options(const std::string& architecture) {
  std::vector<std::string> options = {"--gpu-architecture=" + architecture, "--std=c++17",
                                      "-default-device", "--ptxas-options=-v"};
  if (!settings().dump_directory.empty()) options.push_back("-lineinfo");
  return options;
}

StatusOr<std::vector<int>> supported_architectures() {
  JFA_ASSIGN_OR_RETURN(const NvrtcApi* api, nvrtc());
  int count = 0;
  if (const nvrtcResult result = api->nvrtcGetNumSupportedArchs(&count); result != NVRTC_SUCCESS) {
    return nvrtc_error(*api, result, "nvrtcGetNumSupportedArchs");
  }
  std::vector<int> architectures(static_cast<std::size_t>(count));
  if (const nvrtcResult result = api->nvrtcGetSupportedArchs(architectures.data());
      result != NVRTC_SUCCESS) {
    return nvrtc_error(*api, result, "nvrtcGetSupportedArchs");
  }
  std::sort(architectures.begin(), architectures.end());
  return architectures;
}

ResourceUsage parse_resource_usage(const std::string& log) {
  ResourceUsage usage;
  for (std::size_t begin = 0, end = 0; begin < log.size(); begin = end + 1) {
    end = std::min(log.find('\n', begin), log.size());
    const std::string line = log.substr(begin, end - begin);
    const auto raise = [&line](int& maximum, const char* unit) {
      maximum = std::max(maximum, number_before(line, unit));
    };
    raise(usage.registers, "registers");
    raise(usage.stack_bytes, "bytes stack frame");
    raise(usage.spill_store_bytes, "bytes spill stores");
    raise(usage.spill_load_bytes, "bytes spill loads");
    if (is_warning(line)) usage.warnings.push_back(line);
  }
  return usage;
}

}  // namespace jax_flash_attn::runtime
