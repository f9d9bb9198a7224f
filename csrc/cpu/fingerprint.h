// Whether memory still holds what it held: for weights that change behind PyTorch's back.
#pragma once

#include <vector>

#include "../types.h"

namespace fused_resnet {

// A 64-bit hash of `bytes` bytes: of all of them up to `most`, above that of 64 words spread over them.
std::uint64_t fingerprint(const void* data, i64 bytes, i64 most);

// The fingerprints of several pieces of memory. `holds` reads the memory: it must still be there.
class Guard {
 public:
  void add(const void* data, i64 bytes, i64 most) { memory_.push_back({data, bytes, most, fingerprint(data, bytes, most)}); }
  void add(const Guard& other) { memory_.insert(memory_.end(), other.memory_.begin(), other.memory_.end()); }  // with what was expected then

  bool holds() const;  // all of them
  i64 size() const { return i64(memory_.size()); }
  bool holds(i64 i) const;  // one; prefetches the next
  i64 bytes_read() const;   // by all

 private:
  struct Memory {
    const void* data;
    i64 bytes, most;
    std::uint64_t expected;

    void prefetch() const;
  };
  std::vector<Memory> memory_;
};

}  // namespace fused_resnet
