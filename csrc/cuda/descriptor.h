// What an error says of a TMA descriptor that the driver refuses.
#pragma once

#include <cstdint>
#include <string>

namespace fused_resnet::cuda {

// "[1, 2, 3]"
template <class T>
std::string listed(const T* values, unsigned count) {
  std::string text = "[";
  for (unsigned i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// Of a tensor of `rank` axes, the innermost first; its `strides` in bytes are those of the outer rank - 1. `box`: what a load of a
// matrix, or a load of pixels under one tap, brings: "128 x 64"; `corners`: of the pixels, "" for a matrix. `why`: the driver's error.
inline std::string refused_descriptor(const char* what, const std::string& why, int type, unsigned rank, const void* address,
                                      const std::uint64_t* sizes, const std::uint64_t* strides, const std::string& box,
                                      const std::string& corners, const std::uint32_t* steps) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string place;
  for (int shift = 60; shift >= 0; shift -= 4) {
    const unsigned digit = unsigned(reinterpret_cast<std::uintptr_t>(address) >> shift) & 15u;
    if (digit || !place.empty() || shift == 0) place += kDigits[digit];
  }
  return std::string("the driver refused the TMA descriptor of ") + what + " (" + why + "): type " + std::to_string(type) + ", address 0x" +
         place + ", sizes " + listed(sizes, rank) + ", strides " + listed(strides, rank - 1) + " bytes, box " + box +
         (corners.empty() ? "" : ", corners " + corners) + ", steps " + listed(steps, rank);
}

}  // namespace fused_resnet::cuda
