#include "device.h"

#include "driver.h"

#include <array>
#include <mutex>
#include <stdexcept>

namespace fused_resnet::cuda {
namespace {

constexpr int kMostDevices = 64;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // not for the next call to find
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}
void check(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) throw std::runtime_error(std::string(what) + ": " + name_of(result));
}

void check_index(int index) {
  if (index < 0 || index >= kMostDevices) throw std::invalid_argument("device index must be from 0 to 63, got " + std::to_string(index));
}

// The context of a device that runtimes share, ours and torch's. Held until the process ends.
CUcontext primary_context(int index) {
  static std::array<std::once_flag, kMostDevices> asked;
  static std::array<CUcontext, kMostDevices> found{};
  check_index(index);
  std::call_once(asked[std::size_t(index)], [index] {
    check(FR_DRIVER(cuDevicePrimaryCtxRetain, 7000)(&found[std::size_t(index)], index), "the device's context");
  });
  return found[std::size_t(index)];
}

std::vector<const void*>& registered() {
  static std::vector<const void*> kernels;
  return kernels;
}

}  // namespace

void register_kernel(const void* kernel) { registered().push_back(kernel); }  // declared in block.h
int kernels_to_load() { return int(registered().size()); }

const Device& device(int index) {
  static std::array<std::once_flag, kMostDevices> asked;
  static std::array<Device, kMostDevices> found;
  check_index(index);
  std::call_once(asked[std::size_t(index)], [index] {
    Device d;
    d.index = index;
    check(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, index), "the device's capability");
    check(cudaDeviceGetAttribute(&d.minor, cudaDevAttrComputeCapabilityMinor, index), "the device's capability");
    check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index), "the device's multiprocessors");
    int kilohertz = 0, bits = 0;
    if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, index) == cudaSuccess &&
        cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, index) == cudaSuccess) {
      d.bandwidth = 2e-3 * kilohertz * (bits / 8.0);  // two transfers a cycle
    } else {
      cudaGetLastError();  // not for the next call to find; the bandwidth is not known
    }
    found[std::size_t(index)] = d;
  });
  return found[std::size_t(index)];
}

DeviceGuard::DeviceGuard(int index) {
  CUdevice current = -1;
  // A context of the device that is not its primary one (a green context) stays: the tensors' stream is of it.
  if (FR_DRIVER(cuCtxGetDevice, 2000)(&current) == CUDA_SUCCESS && current == index) return;
  CUcontext before = nullptr;
  check(FR_DRIVER(cuCtxGetCurrent, 4000)(&before), "the current context");
  check(FR_DRIVER(cuCtxSetCurrent, 4000)(primary_context(index)), "to the tensors' device");
  before_ = before;
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) FR_DRIVER(cuCtxSetCurrent, 4000)(static_cast<CUcontext>(before_));
}

CaptureIsUntouched::CaptureIsUntouched() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "the capture mode");
  before_ = int(mode);
}

CaptureIsUntouched::~CaptureIsUntouched() {
  auto mode = cudaStreamCaptureMode(before_);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

void load(int index) {
  const CaptureIsUntouched relaxed;
  const DeviceGuard guard(index);
  for (const void* kernel : registered()) {
    cudaFuncAttributes found;
    check(cudaFuncGetAttributes(&found, kernel), "a kernel of this build");
  }
}

std::vector<std::pair<std::string, std::string>> build() {
  return {{"cuda", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)}, {"architectures", FR_ARCHITECTURES}};
}

}  // namespace fused_resnet::cuda
