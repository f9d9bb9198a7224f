// Devices: what they are, and which one the calls of a thread go to.
#pragma once

#include <string>
#include <vector>

#include "config.h"

namespace fused_resnet::cuda {

// Properties of device `index`, asked once. Throws std::runtime_error with CUDA's text.
const Device& device(int index);

// Makes a device current for a while, and the one before it current again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;
};

// What the module was built with: {"cuda": "13.0", "architectures": "80 90a"}.
std::vector<std::pair<std::string, std::string>> build();

}  // namespace fused_resnet::cuda
