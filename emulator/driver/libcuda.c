// The part of CUDA's driver library that Triton's launcher calls, without a GPU. A launch is handed to a function of
// ours, with the very parameters that the driver would get, and counted; a tensor map holds what it would be encoded
// from. driver/__init__.py builds it.

#include "cuda.h"
#include <string.h>

typedef struct {
  unsigned grid[3], block, shared;
  int programmatic;  // may start before the launch ahead of it ends
  unsigned long long stream, function;
} Launch;

typedef CUresult (*OnLaunch)(const Launch *launch, void **params);

static OnLaunch on_launch;
static int maps;
static size_t modules;  // each has one function, of the same number
static unsigned char unloaded[1 << 16];
static char refusal[4096] = "refused by the driver that stands in for CUDA's";

void driver_on_launch(OnLaunch function) { on_launch = function; }
void driver_refuse(const char *why) { strncpy(refusal, why, sizeof refusal - 1); }
int driver_maps(void) { return maps; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  if (unloaded[(size_t)function]) return CUDA_ERROR_INVALID_HANDLE;
  if (!on_launch) return CUDA_SUCCESS;
  Launch launch = {{config->gridDimX, config->gridDimY, config->gridDimZ}, config->blockDimX, config->sharedMemBytes, 0,
                   (unsigned long long)config->hStream, (unsigned long long)function};
  for (unsigned i = 0; i < config->numAttrs; ++i)
    launch.programmatic |= config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  return on_launch(&launch, params);
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sides, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned long long words[16] = {(unsigned long long)address, type | rank << 8 | swizzle << 16 | fill << 24};
  if (rank > 5 || (unsigned long long)address % 16) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < rank; ++i) {
    if (box[i] > 256 || steps[i] != 1 || (i + 1 < rank && strides[i] % 16)) return CUDA_ERROR_INVALID_VALUE;
    words[2 + i] = sides[i] | (unsigned long long)box[i] << 40;
    if (i + 1 < rank) words[8 + i] = strides[i];
  }
  memcpy(map, words, sizeof words);
  ++maps;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (++modules >= sizeof unloaded) return CUDA_ERROR_OUT_OF_MEMORY;
  *module = (CUmodule)modules;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  unloaded[(size_t)module] = 1;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 227 * 1024;  // asked for shared memory alone
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = refusal;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

// called by nobody here, but linked
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
