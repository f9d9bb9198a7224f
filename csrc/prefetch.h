// Prefetching for passes over many small objects that lie anywhere in memory.
#pragma once

#include <cstddef>

namespace fused_resnet {

// How many objects ahead: a core has 10 to 24 cache lines on their way at a time, and an object is one or two.
inline constexpr std::size_t kPrefetched = 12;

// The line of an object's head. Any address may be given, also one where nothing is any more.
inline void prefetch(const void* object) {
#if defined(__GNUC__)
  __builtin_prefetch(object);
#else
  (void)object;
#endif
}

}  // namespace fused_resnet
