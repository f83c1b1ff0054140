#include "launchers/attention_params.h"

#include <algorithm>
#include <cmath>

#include "runtime/device.h"

namespace jax_flash_attn::launchers {
namespace {

using runtime::Status;
using runtime::StatusOr;

// Sums of an index, a diagonal and a window stay below 2^31.
constexpr std::int64_t kLargestSeqlen = std::int64_t{1} << 28;
// Row strides of a packed tensor, three times this, fit into 32 bits.
constexpr std::int64_t kLargestRow = std::int64_t{1} << 29;
// Rows of the smallest tile of any kernel: bounds the number of CTAs.
constexpr std::int64_t kSmallestTile = 16;

constexpr char kJaxInstead[] = ". Pass implementation=\"jax\" for plain JAX.";

// A side without a limit gets a window longer than any sequence.
int window(std::int64_t size) {
  return static_cast<int>(size < 0 ? kLargestSeqlen : std::min(size, kLargestSeqlen));
}

// A probability is kept when its 32 random bits are at least this (jax_flash_attn/dropout.py).
unsigned dropout_threshold(double dropout_p) {
  return static_cast<unsigned>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
}

}  // namespace

Status check_sizes(const AttentionShape& shape) {
  const std::int64_t rows = std::max(shape.seqlen_q, shape.seqlen_k);
  if (rows > kLargestSeqlen) {
    return Status::unimplemented("The kernels take sequences of up to 2^28 rows, got " +
                                 std::to_string(rows) + kJaxInstead);
  }
  if (shape.heads * shape.head_dim > kLargestRow) {
    return Status::unimplemented("The kernels take heads * head_dim of up to 2^29, got " +
                                 std::to_string(shape.heads * shape.head_dim) + kJaxInstead);
  }
  if (shape.batch * shape.heads >
      (std::int64_t{1} << 31) / std::max<std::int64_t>(1, ceil_div(rows, kSmallestTile))) {
    return Status::unimplemented("batch * heads * seqlen is too large for one launch, got " +
                                 std::to_string(shape.batch) + " * " + std::to_string(shape.heads) +
                                 " * " + std::to_string(rows) + ": split the batch.");
  }
  return Status();
}

jfa::AttentionParams make_attention_params(const AttentionSpec& spec, const AttentionShape& shape) {
  jfa::AttentionParams params{};
  params.batch = static_cast<int>(shape.batch);
  params.heads = static_cast<int>(shape.heads);
  params.heads_k = static_cast<int>(shape.heads_k);
  params.seqlen_q = static_cast<int>(shape.seqlen_q);
  params.seqlen_k = static_cast<int>(shape.seqlen_k);
  params.diagonal = spec.top_left ? 0 : params.seqlen_k - params.seqlen_q;
  params.window_left = window(spec.window_left);
  params.window_right = window(spec.window_right);
  params.softmax_scale = static_cast<float>(spec.softmax_scale);
  params.softcap = static_cast<float>(spec.softcap);
  params.dropout_threshold = dropout_threshold(spec.dropout_p);
  params.dropout_scale = static_cast<float>(1.0 / (1.0 - spec.dropout_p));
  return params;
}

StatusOr<CurrentDevice> current_target() {
  JFA_ASSIGN_OR_RETURN(const int ordinal, runtime::current_device());
  JFA_ASSIGN_OR_RETURN(const runtime::DeviceInfo* info, runtime::device_info(ordinal));
  JFA_ASSIGN_OR_RETURN(Target target,
                       device_target(info->compute_capability, info->shared_bytes_per_block_optin,
                                     info->multiprocessors));
  return CurrentDevice{ordinal, std::move(target)};
}

StatusOr<const runtime::Kernel*> load(const KernelSpecialization& kernel, int device) {
  return runtime::kernel_cache().get(kernel.request, kernel.entry, device, kernel.shared_bytes);
}

Status check_not_capturing(runtime::CUstream stream) {
  JFA_ASSIGN_OR_RETURN(const runtime::DriverApi* cuda, runtime::driver());
  runtime::CUstreamCaptureStatus capture{};
  JFA_RETURN_IF_ERROR(
      runtime::driver_error(cuda->cuStreamIsCapturing(stream, &capture), "cuStreamIsCapturing"));
  if (capture == runtime::CU_STREAM_CAPTURE_STATUS_NONE) return Status();
  return Status::failed_precondition(
      "A flash attention kernel was not loaded when a CUDA graph that calls it was recorded. Run "
      "the program once with XLA_FLAGS=--xla_gpu_enable_command_buffer= and report this.");
}

runtime::LaunchShape launch_shape(const KernelSpecialization& specialization, std::int64_t ctas,
                                  bool behind_same_call) {
  return {static_cast<unsigned>(ctas),
          1,
          1,
          static_cast<unsigned>(specialization.threads),
          specialization.shared_bytes,
          specialization.starts_early && behind_same_call,
          static_cast<unsigned>(specialization.cluster_ctas)};
}

Status launch(const runtime::Kernel& kernel, const KernelSpecialization& specialization,
              std::int64_t ctas, runtime::CUstream stream, const void* params,
              bool behind_same_call) {
  if (ctas == 0) return Status();
  return runtime::launch(kernel, launch_shape(specialization, ctas, behind_same_call), stream,
                         params);
}

}  // namespace jax_flash_attn::launchers
