// Scratch memory, kept from call to call in the thread that calls: a fresh allocation of this size would pay page faults
// each time.
#pragma once

#include <cstdlib>
#include <new>

#include "../types.h"
#include "huge_pages.h"

namespace fused_resnet {

class Workspace {
 public:
  // More than this is given back after the call.
  static constexpr i64 kKept = i64(16) << 20;

  explicit Workspace(i64 bytes) : data_(kept().data) {
    if (bytes > kept().size) {
      void* data = nullptr;
      if (posix_memalign(&data, 64, std::size_t(bytes)) != 0) throw std::bad_alloc();
      prefer_huge_pages(data, bytes);
      std::free(kept().data);
      kept().data = static_cast<char*>(data);
      kept().size = bytes;
      data_ = kept().data;
    }
  }
  ~Workspace() {
    if (kept().size > kKept) kept().release();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return data_; }

 private:
  struct Kept {
    char* data = nullptr;
    i64 size = 0;
    void release() {
      std::free(data);
      data = nullptr;
      size = 0;
    }
    ~Kept() { release(); }
  };
  static Kept& kept() {
    static thread_local Kept buffer;
    return buffer;
  }
  char* data_;
};

}  // namespace fused_resnet
