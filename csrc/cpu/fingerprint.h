// Whether memory still holds what it held: for weights that change behind PyTorch's back.
#pragma once

#include <vector>

#include "../types.h"

namespace fused_resnet {

// A 64-bit hash of `bytes` bytes: of all of them up to `most`, above that of 64 words spread over them.
std::uint64_t fingerprint(const void* data, i64 bytes, i64 most);

// The fingerprints of several pieces of memory.
class Guard {
 public:
  explicit Guard(i64 most) : most_(most) {}
  void add(const void* data, i64 bytes) { memory_.push_back({data, bytes, fingerprint(data, bytes, most_)}); }
  bool holds() const;  // reads the memory: it must still be there

 private:
  struct Memory {
    const void* data;
    i64 bytes;
    std::uint64_t expected;
  };
  i64 most_;
  std::vector<Memory> memory_;
};

}  // namespace fused_resnet
