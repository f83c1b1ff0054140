// The CUDA driver, reached through dlopen so that the extension imports on a machine without one.
//
// Types, enumerators and functions keep NVIDIA's names and layouts (cuda.h, CUDA 12.0); only what
// the library uses is declared. The rest of the host code sees the driver through this file alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "runtime/status.h"

namespace jax_flash_attn::runtime {

using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUfunction = struct CUfunc_st*;
using CUkernel = struct CUkern_st*;
using CUlibrary = struct CUlib_st*;

enum CUresult : int {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
};

enum CUdevice_attribute : int {
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
};

enum CUfunction_attribute : int {
  CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1,
  CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3,
  CU_FUNC_ATTRIBUTE_NUM_REGS = 4,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
};

enum CUstreamCaptureStatus : int {
  CU_STREAM_CAPTURE_STATUS_NONE = 0,
  CU_STREAM_CAPTURE_STATUS_ACTIVE = 1,
  CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2,
};

enum CUlaunchAttributeID : int {
  CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4,
  CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
};

enum CUtensorMapDataType : int { CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1 };
enum CUtensorMapInterleave : int { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle : int { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion : int { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill : int { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };  // zeros

struct alignas(64) CUtensorMap {
  std::uint64_t opaque[16];
};

union CUlaunchAttributeValue {
  char pad[64];
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
  std::uint64_t alignment;  // the union in cuda.h holds pointers
};

struct CUlaunchAttribute {
  CUlaunchAttributeID id;
  char pad[4];
  CUlaunchAttributeValue value;
};

struct CUlaunchConfig {
  unsigned gridDimX, gridDimY, gridDimZ;
  unsigned blockDimX, blockDimY, blockDimZ;
  unsigned sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute* attrs;
  unsigned numAttrs;
};

static_assert(sizeof(CUlaunchAttribute) == 72 && offsetof(CUlaunchAttribute, value) == 8,
              "CUlaunchAttribute must have the layout of cuda.h");
static_assert(sizeof(CUlaunchConfig) == 56 && offsetof(CUlaunchConfig, hStream) == 32,
              "CUlaunchConfig must have the layout of cuda.h");

// Driver functions in their CUDA 12.0 versions.
struct DriverApi {
  int version;  // newest CUDA the driver supports: 1000 * major + 10 * minor

  CUresult (*cuInit)(unsigned flags);
  CUresult (*cuDriverGetVersion)(int* version);
  CUresult (*cuGetErrorName)(CUresult error, const char** name);
  CUresult (*cuGetErrorString)(CUresult error, const char** description);

  CUresult (*cuDeviceGetCount)(int* count);
  CUresult (*cuDeviceGet)(CUdevice* device, int ordinal);
  CUresult (*cuDeviceGetName)(char* name, int capacity, CUdevice device);
  CUresult (*cuDeviceGetAttribute)(int* value, CUdevice_attribute attribute, CUdevice device);

  CUresult (*cuCtxGetCurrent)(CUcontext* context);
  CUresult (*cuCtxGetDevice)(CUdevice* device);
  CUresult (*cuCtxPushCurrent)(CUcontext context);
  CUresult (*cuCtxPopCurrent)(CUcontext* context);
  CUresult (*cuStreamGetCtx)(CUstream stream, CUcontext* context);
  CUresult (*cuStreamIsCapturing)(CUstream stream, CUstreamCaptureStatus* status);

  // The options, of no use here, are declared as untyped pointers: pass null and 0.
  CUresult (*cuLibraryLoadData)(CUlibrary* library, const void* code, void* jit_options,
                                void** jit_values, unsigned num_jit_options, void* library_options,
                                void** library_values, unsigned num_library_options);
  CUresult (*cuLibraryGetKernel)(CUkernel* kernel, CUlibrary library, const char* name);
  CUresult (*cuKernelGetFunction)(CUfunction* function, CUkernel kernel);
  CUresult (*cuKernelSetAttribute)(CUfunction_attribute attribute, int value, CUkernel kernel,
                                   CUdevice device);
  CUresult (*cuFuncGetAttribute)(int* value, CUfunction_attribute attribute, CUfunction function);
  CUresult (*cuFuncSetAttribute)(CUfunction function, CUfunction_attribute attribute, int value);
  CUresult (*cuLaunchKernelEx)(const CUlaunchConfig* config, CUfunction function, void** params,
                               void** extra);
  CUresult (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int* num_ctas, CUfunction function,
                                                          int threads_per_cta,
                                                          std::size_t dynamic_shared_bytes);
  CUresult (*cuOccupancyMaxActiveClusters)(int* num_clusters, CUfunction function,
                                           const CUlaunchConfig* config);

  CUresult (*cuTensorMapEncodeTiled)(CUtensorMap* map, CUtensorMapDataType type, std::uint32_t rank,
                                     void* address, const std::uint64_t* dims,
                                     const std::uint64_t* strides, const std::uint32_t* box,
                                     const std::uint32_t* element_strides,
                                     CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                     CUtensorMapL2promotion promotion,
                                     CUtensorMapFloatOOBfill out_of_bounds);

  CUresult (*cuMemsetD8Async)(CUdeviceptr address, unsigned char value, std::size_t count,
                              CUstream stream);
  CUresult (*cuMemsetD32Async)(CUdeviceptr address, unsigned value, std::size_t count,
                               CUstream stream);
};

// The initialised driver (cuInit has succeeded). Loads it on the first call; success is remembered,
// a failure is not. kFailedPrecondition says in one sentence what is missing and the remedy.
// Thread-safe; one atomic load once loaded.
StatusOr<const DriverApi*> driver();

// The newest CUDA version the driver supports (12040 for 12.4), or none without a driver. Does not
// initialise the driver, so it is safe before a fork.
std::optional<int> driver_version();

// A Status for a driver call that failed: "<operation> failed: NAME (description)". Out of memory
// becomes kResourceExhausted and names the remedy. ok for CUDA_SUCCESS.
Status driver_error(CUresult result, const char* operation);

}  // namespace jax_flash_attn::runtime
