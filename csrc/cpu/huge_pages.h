// Fewer misses of the address translation where many megabytes are streamed: packed weights and large workspaces.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "../types.h"

namespace fused_resnet {

// To be called before the memory is first touched. A wish only: the system may not have huge pages, or may have none left. It takes
// no more memory: only pages that lie inside.
inline void prefer_huge_pages(void* data, i64 bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t(2) << 20;
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (first + kPage - 1) / kPage * kPage, end = (first + std::uintptr_t(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fused_resnet
