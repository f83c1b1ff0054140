// The extension module jax_flash_attn._native: what Python sees of the native side. Only
// jax_flash_attn/_ffi.py imports it; its types are in jax_flash_attn/_native.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <params/backward_params.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "ffi/handlers.h"
#include "launchers/attention_params.h"
#include "launchers/attention_spec.h"
#include "launchers/specialization.h"
#include "launchers/tile_override.h"
#include "launchers/tile_table.h"
#include "runtime/compiler.h"
#include "runtime/device.h"
#include "runtime/disk_cache.h"
#include "runtime/driver_api.h"
#include "runtime/kernel_cache.h"
#include "runtime/nvrtc_api.h"
#include "runtime/settings.h"

namespace nb = nanobind;

namespace jax_flash_attn::ffi {
namespace {

using launchers::AttentionShape;
using launchers::AttentionSpec;
using runtime::Status;
using runtime::StatusCode;
using runtime::StatusOr;

void raise_if_error(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::kInvalidArgument)
    throw nb::value_error(status.message().c_str());
  if (status.code() == StatusCode::kUnimplemented) {
    PyErr_SetString(PyExc_NotImplementedError, status.message().c_str());
    throw nb::python_error();
  }
  throw std::runtime_error(status.message());
}

template <typename T>
T value_or_raise(StatusOr<T> result) {
  raise_if_error(result.status());
  return std::move(result).value();
}

nb::dict registrations() {
  const auto capsule = [](auto* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); };
  nb::dict forward;
  forward["initialize"] = capsule(flash_attention_forward_initialize);
  forward["execute"] = capsule(flash_attention_forward_execute);
  nb::dict backward;
  backward["initialize"] = capsule(flash_attention_backward_initialize);
  backward["execute"] = capsule(flash_attention_backward_execute);
  nb::dict empty;
  empty["execute"] = capsule(flash_attention_empty_execute);
  nb::dict targets;
  targets["flash_attention_forward"] = forward;
  targets["flash_attention_backward"] = backward;
  targets["flash_attention_empty"] = empty;
  return targets;
}

void configure(std::string kernel_directory, std::string cache_directory, std::string nvrtc_path,
               std::vector<std::string> nvrtc_directories, std::string dump_directory,
               std::string version) {
  runtime::configure({std::move(kernel_directory), std::move(cache_directory),
                      std::move(nvrtc_path), std::move(nvrtc_directories),
                      std::move(dump_directory), std::move(version)});
}

// One operation's kernels and its tiles in words.
struct Kernels {
  std::string tiles;
  std::vector<launchers::KernelSpecialization> kernels;
};

StatusOr<Kernels> specialize(const std::string& operation, const AttentionSpec& spec,
                             const AttentionShape& shape, const launchers::Target& target,
                             const std::string& tiles) {
  JFA_ASSIGN_OR_RETURN(auto forced, launchers::parse_tile_override(operation, tiles));
  if (operation == "forward") {
    if (!forced) forced = launchers::forward_override();
    JFA_ASSIGN_OR_RETURN(auto forward, launchers::specialize_forward(spec, shape, target, forced));
    return Kernels{forward.tiles, {forward.main}};
  }
  if (!forced) forced = launchers::backward_override();
  JFA_ASSIGN_OR_RETURN(auto backward, launchers::specialize_backward(spec, shape, target, forced));
  return Kernels{backward.tiles, backward.kernels()};
}

// Where no length is given: longer than any row of the tile tables is limited to.
constexpr std::int64_t kLongSeqlen = std::numeric_limits<std::int32_t>::max();

// A shape of which tiles depend on the rest, too: where that is not given, of no heads.
StatusOr<AttentionShape> shape_of(const std::string& dtype, AttentionShape shape) {
  if (dtype != "bfloat16" && dtype != "float16") {
    return Status::invalid_argument("dtype must be 'bfloat16' or 'float16', got '" + dtype + "'.");
  }
  shape.element =
      dtype == "bfloat16" ? launchers::Element::kBFloat16 : launchers::Element::kFloat16;
  return shape;
}

AttentionSpec spec_of(const nb::dict& fields) {
  AttentionSpec spec;
  spec.softmax_scale = nb::cast<double>(fields["softmax_scale"]);
  spec.window_left = nb::cast<std::int64_t>(fields["window_left"]);
  spec.window_right = nb::cast<std::int64_t>(fields["window_right"]);
  spec.top_left = nb::cast<bool>(fields["top_left"]);
  spec.softcap = nb::cast<double>(fields["softcap"]);
  spec.alibi = nb::cast<bool>(fields["alibi"]);
  spec.dropout_p = nb::cast<double>(fields["dropout_p"]);
  spec.deterministic = nb::cast<bool>(fields["deterministic"]);
  spec.packing = nb::cast<std::string>(fields["packing"]);
  return spec;
}

// Where the number of multiprocessors is 0, that of the architecture's usual device.
Kernels specialize_named(const std::string& operation, const nb::dict& fields,
                         const std::string& dtype, const AttentionShape& shape,
                         const std::string& architecture, int multiprocessors,
                         const std::string& tiles) {
  launchers::Target target = value_or_raise(launchers::named_target(architecture));
  if (multiprocessors > 0) target.multiprocessors = multiprocessors;
  return value_or_raise(specialize(operation, spec_of(fields),
                                   value_or_raise(shape_of(dtype, shape)), target, tiles));
}

std::string tiles(const std::string& operation, const nb::dict& fields, const std::string& dtype,
                  int head_dim, const std::string& architecture, std::int64_t seqlen_q,
                  std::int64_t batch, std::int64_t seqlen_k, std::int64_t heads,
                  std::int64_t heads_k, int multiprocessors) {
  const AttentionShape shape{{}, batch, seqlen_q, seqlen_k, heads, heads_k, head_dim};
  return specialize_named(operation, fields, dtype, shape, architecture, multiprocessors, "").tiles;
}

// Compiles an operation's kernels into the cache. `fresh`: compile even what the cache has, so that
// the compiler's report is there. `tiles`: as override_tiles takes them, for this time.
nb::list compile(const std::string& operation, const nb::dict& fields, const std::string& dtype,
                 int head_dim, const std::string& architecture, bool fresh,
                 const std::string& tiles, std::int64_t seqlen_q, std::int64_t batch,
                 std::int64_t seqlen_k, std::int64_t heads, std::int64_t heads_k) {
  const AttentionShape shape{{}, batch, seqlen_q, seqlen_k, heads, heads_k, head_dim};
  const Kernels kernels = specialize_named(operation, fields, dtype, shape, architecture,
                                           /*multiprocessors=*/0, tiles);
  nb::list report;
  for (const launchers::KernelSpecialization& kernel : kernels.kernels) {
    runtime::CubinInfo info{};
    Status status;
    {
      nb::gil_scoped_release release;
      if (fresh) {
        auto compiled = runtime::compile(kernel.request);
        status = compiled.status();
        if (compiled.ok()) info = {compiled->cubin, false, compiled->seconds, compiled->log};
      } else {
        auto cached = runtime::kernel_cache().cubin(kernel.request);
        status = cached.status();
        if (cached.ok()) info = *cached;
      }
    }
    raise_if_error(status);
    const runtime::ResourceUsage usage = runtime::parse_resource_usage(info.log);
    nb::dict row;
    row["entry"] = kernel.entry;
    row["tiles"] = kernels.tiles;
    row["source"] = kernel.request.source;
    row["shared_bytes"] = kernel.shared_bytes;
    row["from_disk"] = info.from_disk;
    row["seconds"] = info.seconds;
    row["cubin"] = nb::bytes(info.cubin.data(), info.cubin.size());
    row["registers"] = usage.registers;
    row["spill_bytes"] = usage.spill_store_bytes + usage.spill_load_bytes;
    row["stack_bytes"] = usage.stack_bytes;
    row["warnings"] = usage.warnings;
    report.append(row);
  }
  return report;
}

nb::list devices() {
  nb::list result;
  for (const runtime::DeviceInfo& info : value_or_raise(runtime::all_devices())) {
    nb::dict row;
    row["ordinal"] = info.ordinal;
    row["name"] = info.name;
    row["compute_capability"] = info.compute_capability;
    row["multiprocessors"] = info.multiprocessors;
    row["architecture"] = value_or_raise(launchers::device_target(info.compute_capability,
                                                                  info.shared_bytes_per_block_optin,
                                                                  info.multiprocessors))
                              .architecture;
    result.append(row);
  }
  return result;
}

int driver_version() { return value_or_raise(runtime::driver())->version; }

nb::dict nvrtc() {
  const runtime::NvrtcApi* api = value_or_raise(runtime::nvrtc());
  nb::dict result;
  result["path"] = api->path;
  result["version"] = std::to_string(api->major) + "." + std::to_string(api->minor);
  return result;
}

nb::dict cache() {
  const runtime::DiskCacheStats stats = runtime::disk_cache_stats();
  nb::dict result;
  result["directory"] = stats.directory;
  result["enabled"] = stats.enabled;
  result["reason_disabled"] = stats.reason_disabled;
  result["entries"] = stats.entries;
  result["bytes"] = stats.bytes;
  return result;
}

bool is_overridden(const std::string& operation) {
  return (operation == "forward" ? launchers::forward_override() : launchers::backward_override())
      .has_value();
}

std::string override_tiles(const std::string& operation, const std::string& text) {
  return value_or_raise(launchers::override_tiles(operation, text));
}

void check_sizes(std::int64_t batch, std::int64_t seqlen_q, std::int64_t seqlen_k,
                 std::int64_t heads, std::int64_t head_dim) {
  raise_if_error(
      launchers::check_sizes({{}, batch, seqlen_q, seqlen_k, heads, /*heads_k=*/heads, head_dim}));
}

}  // namespace

NB_MODULE(_native, module) {
  module.def("registrations", &registrations);
  module.def("configure", &configure, nb::arg("kernel_directory"), nb::arg("cache_directory"),
             nb::arg("nvrtc_path"), nb::arg("nvrtc_directories"), nb::arg("dump_directory"),
             nb::arg("version"));
  module.def("tiles", &tiles, nb::arg("operation"), nb::arg("spec"), nb::arg("dtype"),
             nb::arg("head_dim"), nb::arg("architecture"), nb::arg("seqlen_q") = kLongSeqlen,
             nb::arg("batch") = 0, nb::arg("seqlen_k") = 0, nb::arg("heads") = 0,
             nb::arg("heads_k") = 0, nb::arg("multiprocessors") = 0);
  module.def("compile", &compile, nb::arg("operation"), nb::arg("spec"), nb::arg("dtype"),
             nb::arg("head_dim"), nb::arg("architecture"), nb::arg("fresh") = false,
             nb::arg("tiles") = "", nb::arg("seqlen_q") = kLongSeqlen, nb::arg("batch") = 0,
             nb::arg("seqlen_k") = 0, nb::arg("heads") = 0, nb::arg("heads_k") = 0);
  nb::list limits;
  for (const std::int64_t limit : launchers::kSeqlenLimits) limits.append(limit);
  module.attr("seqlen_limits") = nb::tuple(limits);
  module.attr("part_head_dim") = jfa::kPartHeadDim;
  module.def("devices", &devices);
  module.def("driver_version", &driver_version);
  module.def("nvrtc", &nvrtc);
  module.def("cache", &cache);
  module.def("check_sizes", &check_sizes, nb::arg("batch"), nb::arg("seqlen_q"),
             nb::arg("seqlen_k"), nb::arg("heads"), nb::arg("head_dim"));
  module.def("override_tiles", &override_tiles, nb::arg("operation"), nb::arg("tiles"));
  module.def("is_overridden", &is_overridden, nb::arg("operation"));
}

}  // namespace jax_flash_attn::ffi
