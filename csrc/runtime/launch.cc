#include "runtime/launch.h"

#include <string>

namespace jax_flash_attn::runtime {
namespace {

std::string describe(const LaunchShape& shape) {
  return "Launching a kernel (grid " + std::to_string(shape.grid_x) + " x " +
         std::to_string(shape.grid_y) + " x " + std::to_string(shape.grid_z) + ", " +
         std::to_string(shape.block_x) + " threads, " + std::to_string(shape.shared_bytes) +
         " bytes of shared memory, clusters of " + std::to_string(shape.cluster_x) + ")";
}

// cuda.h's description of a launch, which points into itself.
struct DriverLaunch {
  CUlaunchAttribute attributes[2] = {};
  CUlaunchConfig config = {};

  explicit DriverLaunch(const LaunchShape& shape, CUstream stream = nullptr) {
    unsigned num_attributes = 0;
    if (shape.programmatic_serialization) {
      CUlaunchAttribute& attribute = attributes[num_attributes++];
      attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
      attribute.value.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster_x > 1) {
      CUlaunchAttribute& attribute = attributes[num_attributes++];
      attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
      attribute.value.clusterDim = {shape.cluster_x, 1, 1};
    }
    config.gridDimX = shape.grid_x;
    config.gridDimY = shape.grid_y;
    config.gridDimZ = shape.grid_z;
    config.blockDimX = shape.block_x;
    config.blockDimY = 1;
    config.blockDimZ = 1;
    config.sharedMemBytes = static_cast<unsigned>(shape.shared_bytes);
    config.hStream = stream;
    config.attrs = attributes;
    config.numAttrs = num_attributes;
  }
  DriverLaunch(const DriverLaunch&) = delete;
  DriverLaunch& operator=(const DriverLaunch&) = delete;
};

}  // namespace

Status launch(const Kernel& kernel, const LaunchShape& shape, CUstream stream, const void* params) {
  JFA_ASSIGN_OR_RETURN(const DriverApi* cuda, driver());
  const DriverLaunch driver_launch(shape, stream);

  // The driver takes the argument's address as void* and only reads from it.
  void* arguments[] = {const_cast<void*>(params)};
  const CUresult result =
      cuda->cuLaunchKernelEx(&driver_launch.config, kernel.function, arguments, /*extra=*/nullptr);
  return result == CUDA_SUCCESS ? Status() : driver_error(result, describe(shape).c_str());
}

StatusOr<int> max_active_clusters(const Kernel& kernel, const LaunchShape& shape) {
  JFA_ASSIGN_OR_RETURN(const DriverApi* cuda, driver());
  const DriverLaunch driver_launch(shape);
  int clusters = 0;
  const CUresult result =
      cuda->cuOccupancyMaxActiveClusters(&clusters, kernel.function, &driver_launch.config);
  JFA_RETURN_IF_ERROR(driver_error(result, "cuOccupancyMaxActiveClusters"));
  return clusters;
}

}  // namespace jax_flash_attn::runtime
