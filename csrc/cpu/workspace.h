// Scratch memory, kept from call to call: a fresh allocation of this size would pay page faults each time.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "../types.h"
#include "huge_pages.h"

namespace fused_resnet {

// Memory of one call, 64-byte aligned, from a pool for the process: taken when made, given back when destroyed. A call has its own,
// however many threads call at once.
class Workspace {
 public:
  // Of what was given back so much is kept, in all: a ResNet-50's batch of eight images in float32, twice. The rest is freed.
  static constexpr i64 kKept = i64(128) << 20;

  // Throws std::bad_alloc.
  explicit Workspace(i64 bytes) : memory_{nullptr, bytes} {
    if (bytes > 0 && !pool().take(memory_)) memory_.data = allocate(bytes);
  }
  ~Workspace() {
    if (memory_.data != nullptr && !pool().give(memory_)) free(memory_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return memory_.data; }

  // Frees what is kept; bytes of it.
  static void release() { pool().release(); }
  static i64 kept() { return pool().bytes(); }

 private:
  struct Memory {
    char* data;
    i64 bytes;
  };

  // From here on pages of its own: between the tensors of the process's heap a large piece that is given back leaves a hole, into which nothing
  // fits that is a little larger.
  static constexpr i64 kOwnPages = i64(1) << 20;

  static char* allocate(i64 bytes) {
    void* data = nullptr;
    if (bytes >= kOwnPages) {
      data = mmap(nullptr, std::size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (data == MAP_FAILED) throw std::bad_alloc();
    } else if (posix_memalign(&data, 64, std::size_t(bytes)) != 0) {
      throw std::bad_alloc();
    }
    prefer_huge_pages(data, bytes);
    return static_cast<char*>(data);
  }
  static void free(const Memory& memory) {
    if (memory.bytes >= kOwnPages) {
      munmap(memory.data, std::size_t(memory.bytes));
    } else {
      std::free(memory.data);
    }
  }

  // Nobody waits for the lock: in a child that was forked while another thread held it, that would be for ever. Without it, a call
  // allocates its memory and frees it.
  class Pool {
   public:
    // The smallest piece that is large enough; where none is, the largest one is freed, in whose place the caller will give back another.
    bool take(Memory& wanted) {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock.owns_lock() || kept_.empty()) return false;
      const auto less = [](const Memory& a, const Memory& b) { return a.bytes < b.bytes; };  // kept_ is in this order
      auto found = std::lower_bound(kept_.begin(), kept_.end(), wanted, less);
      const bool enough = found != kept_.end();
      if (enough) {
        wanted = *found;
      } else {
        free(*--found);
      }
      bytes_ -= found->bytes;
      kept_.erase(found);
      return enough;
    }
    bool give(const Memory& memory) {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock.owns_lock() || bytes_ + memory.bytes > kKept || kept_.size() == kept_.capacity()) return false;
      const auto less = [](const Memory& a, const Memory& b) { return a.bytes < b.bytes; };
      kept_.insert(std::upper_bound(kept_.begin(), kept_.end(), memory, less), memory);
      bytes_ += memory.bytes;
      return true;
    }
    void release() {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock.owns_lock()) return;
      for (const Memory& memory : kept_) free(memory);
      kept_.clear();
      bytes_ = 0;
    }
    i64 bytes() {
      const std::lock_guard<std::mutex> lock(mutex_);
      return bytes_;
    }
    Pool() { kept_.reserve(kMostPieces); }

   private:
    static constexpr std::size_t kMostPieces = 64;  // giving back must not allocate

    std::mutex mutex_;
    std::vector<Memory> kept_;
    i64 bytes_ = 0;
  };
  static Pool& pool() {
    static Pool* const made = new Pool;  // never destroyed: a thread may run when the process ends
    return *made;
  }

  Memory memory_;
};

}  // namespace fused_resnet
