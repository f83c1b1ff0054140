#include "runtime/device.h"

#include "runtime/driver_api.h"
#include "runtime/single_flight.h"

namespace jax_flash_attn::runtime {
namespace {

StatusOr<int> attribute(const DriverApi& cuda, CUdevice device, CUdevice_attribute name) {
  int value = 0;
  JFA_RETURN_IF_ERROR(
      driver_error(cuda.cuDeviceGetAttribute(&value, name, device), "cuDeviceGetAttribute"));
  return value;
}

StatusOr<DeviceInfo> read_device(const DriverApi& cuda, int ordinal) {
  constexpr int kNameCapacity = 256;
  CUdevice device = 0;
  JFA_RETURN_IF_ERROR(driver_error(cuda.cuDeviceGet(&device, ordinal), "cuDeviceGet"));
  char name[kNameCapacity] = {};
  JFA_RETURN_IF_ERROR(
      driver_error(cuda.cuDeviceGetName(name, kNameCapacity, device), "cuDeviceGetName"));

  DeviceInfo info = {};
  info.ordinal = ordinal;
  info.name = name;
  JFA_ASSIGN_OR_RETURN(const int major,
                       attribute(cuda, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR));
  JFA_ASSIGN_OR_RETURN(const int minor,
                       attribute(cuda, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR));
  info.compute_capability = 10 * major + minor;
  JFA_ASSIGN_OR_RETURN(info.multiprocessors,
                       attribute(cuda, device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
  JFA_ASSIGN_OR_RETURN(
      info.shared_bytes_per_block_optin,
      attribute(cuda, device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN));
  JFA_ASSIGN_OR_RETURN(
      info.shared_bytes_per_multiprocessor,
      attribute(cuda, device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR));
  return info;
}

StatusOr<std::vector<DeviceInfo>> read_devices() {
  JFA_ASSIGN_OR_RETURN(const DriverApi* cuda, driver());
  int count = 0;
  JFA_RETURN_IF_ERROR(driver_error(cuda->cuDeviceGetCount(&count), "cuDeviceGetCount"));
  std::vector<DeviceInfo> devices;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    JFA_ASSIGN_OR_RETURN(DeviceInfo info, read_device(*cuda, ordinal));
    devices.push_back(std::move(info));
  }
  return devices;
}

StatusOr<const std::vector<DeviceInfo>*> devices() {
  // Leaked: pointers to its elements are handed out.
  static auto& flight = *new SingleFlight<std::vector<DeviceInfo>>();
  return flight.get(read_devices);
}

}  // namespace

StatusOr<const DeviceInfo*> device_info(int ordinal) {
  JFA_ASSIGN_OR_RETURN(const std::vector<DeviceInfo>* infos, devices());
  if (ordinal < 0 || ordinal >= static_cast<int>(infos->size())) {
    return Status::invalid_argument("Got device ordinal " + std::to_string(ordinal) +
                                    "; this process sees " + std::to_string(infos->size()) +
                                    " CUDA device(s).");
  }
  return &(*infos)[static_cast<std::size_t>(ordinal)];
}

StatusOr<int> current_device() {
  JFA_ASSIGN_OR_RETURN(const DriverApi* cuda, driver());
  CUcontext context = nullptr;
  JFA_RETURN_IF_ERROR(driver_error(cuda->cuCtxGetCurrent(&context), "cuCtxGetCurrent"));
  if (context == nullptr) {
    return Status::failed_precondition(
        "The calling thread has no current CUDA context: make the stream's context current first.");
  }
  CUdevice device = 0;  // the driver's handle of a device is its ordinal
  JFA_RETURN_IF_ERROR(driver_error(cuda->cuCtxGetDevice(&device), "cuCtxGetDevice"));
  return device;
}

StatusOr<std::vector<DeviceInfo>> all_devices() {
  JFA_ASSIGN_OR_RETURN(const std::vector<DeviceInfo>* infos, devices());
  return *infos;
}

}  // namespace jax_flash_attn::runtime
