#include "driver.h"

#include <stdexcept>

namespace fused_resnet::cuda {

void* driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error == cudaSuccess && found == cudaDriverEntryPointSuccess && function) return function;
  cudaGetLastError();  // not for the next call to find
  throw std::runtime_error(std::string("the driver has no ") + name + " of CUDA " + std::to_string(version / 1000) + "." +
                           std::to_string(version % 1000 / 10) + (error == cudaSuccess ? "" : std::string(": ") + cudaGetErrorString(error)));
}

std::string name_of(CUresult result) {
  const char* name = nullptr;
  if (FR_DRIVER(cuGetErrorName, 6000)(result, &name) == CUDA_SUCCESS && name) return name;
  return "error " + std::to_string(int(result));
}

}  // namespace fused_resnet::cuda
