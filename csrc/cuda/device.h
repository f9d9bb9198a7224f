// Devices: what they are, and which one the calls of a thread go to.
#pragma once

#include <string>
#include <vector>

#include "config.h"

namespace fused_resnet::cuda {

// Properties of device `index`, asked once. Throws std::runtime_error with CUDA's text.
const Device& device(int index);

// Makes a device's context current for a while, and the one before it current again. The driver's context and not the runtime's device:
// our runtime is a static one of its own, which is not told what torch's was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* before_ = nullptr;  // a CUcontext, or null: a thread that had none
  bool changed_ = false;
};

// While there is one, this thread may do what a stream capture, of whatever stream and mode, would else forbid it: load a kernel, which
// CUDA does when it is first asked of. Nothing may be launched meanwhile.
class CaptureIsUntouched {
 public:
  CaptureIsUntouched();
  ~CaptureIsUntouched();
  CaptureIsUntouched(const CaptureIsUntouched&) = delete;
  CaptureIsUntouched& operator=(const CaptureIsUntouched&) = delete;

 private:
  int before_ = 0;  // a cudaStreamCaptureMode
};

// Loads the kernels of launch.h onto a device, so that no first launch inside a capture has to; a tensor-core kernel is loaded with its
// plan. Throws std::runtime_error where the build has none for it.
void load(int index);
int kernels_to_load();  // how many they are

// What the module was built with: {"cuda": "13.0", "architectures": "80 90a"}.
std::vector<std::pair<std::string, std::string>> build();

}  // namespace fused_resnet::cuda
