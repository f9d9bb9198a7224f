#include "device.h"

#include <cuda_runtime.h>

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

}  // namespace

const Device& device(int index) {
  static std::array<std::once_flag, kMostDevices> asked;
  static std::array<Device, kMostDevices> found;
  if (index < 0 || index >= kMostDevices) throw std::invalid_argument("device index must be from 0 to 63, got " + std::to_string(index));
  std::call_once(asked[std::size_t(index)], [index] {
    Device d;
    d.index = index;
    check(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, index), "the device's capability");
    check(cudaDeviceGetAttribute(&d.minor, cudaDevAttrComputeCapabilityMinor, index), "the device's capability");
    check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index), "the device's multiprocessors");
    found[std::size_t(index)] = d;
  });
  return found[std::size_t(index)];
}

DeviceGuard::DeviceGuard(int index) {
  int current = -1;
  check(cudaGetDevice(&current), "the current device");
  if (current != index) {
    check(cudaSetDevice(index), "to the tensors' device");
    before_ = current;
  }
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

std::vector<std::pair<std::string, std::string>> build() {
  return {{"cuda", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)}, {"architectures", FR_ARCHITECTURES}};
}

}  // namespace fused_resnet::cuda
