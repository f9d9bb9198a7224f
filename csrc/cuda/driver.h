// Functions of the CUDA driver, found at run time: the module is linked with no libcuda, so that it loads where there is no driver.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <string>

namespace fused_resnet::cuda {

// The driver's function of this name as CUDA `version` had it (1000 * major + 10 * minor). Throws std::runtime_error where the driver
// has none, which is older then.
void* driver_function(const char* name, unsigned version);

// "CUDA_ERROR_INVALID_VALUE", or the number of an error that the driver has no name for.
std::string name_of(CUresult result);

}  // namespace fused_resnet::cuda

// A driver function, asked for by the first call from here: FR_DRIVER(cuCtxGetCurrent, 4000)(&context).
#define FR_DRIVER(name, version)                                                                                                 \
  ([] {                                                                                                                          \
    static const auto function =                                                                                                 \
        reinterpret_cast<PFN_##name##_v##version>(::fused_resnet::cuda::driver_function(#name, version));                        \
    return function;                                                                                                             \
  }())
