#include "dispatch.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <stdexcept>

namespace fused_resnet {

#if defined(__x86_64__)
namespace {
const KernelTable& avx512_bf16_table() {
  static const KernelTable table = [] {
    KernelTable t = kAvx512Table;
    t.isa = "avx512_bf16";
    t.dtype[int(DType::bfloat16)] = kAvx512Bf16Kernels;
    return t;
  }();
  return table;
}
}  // namespace
#endif

std::vector<const KernelTable*> available_tables() {
  std::vector<const KernelTable*> tables = {&kScalarTable};
#if defined(__x86_64__)
  // These also ask the operating system whether it saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&kAvx2Table);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      tables.push_back(&kAvx512Table);
      if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16_table());
    }
  }
#endif
  return tables;
}

namespace {
std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{available_tables().back()};
  return table;
}
}  // namespace

const KernelTable& current_table() { return *current().load(std::memory_order_acquire); }

void set_isa(const std::string& name) {
  std::string choices;
  for (const KernelTable* table : available_tables()) {
    if (name == table->isa) {
      current().store(table, std::memory_order_release);
      return;
    }
    choices += (choices.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument("the instruction set must be one of " + choices + " on this machine, got '" + name + "'");
}

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = [] {
    CacheSizes found;
    const auto read = [](int name, i64* size) {
      const long value = sysconf(name);
      if (value > 0) *size = value;
    };
    read(_SC_LEVEL1_DCACHE_SIZE, &found.l1d);
    read(_SC_LEVEL2_CACHE_SIZE, &found.l2);
    i64 all = 0;
    read(_SC_LEVEL3_CACHE_SIZE, &all);
    if (all > 0) found.l3 = all;
    // On AMD the C library adds up the parts of the L3 cache; the kernel tells the part that a core can fill.
    i64 part = 0;
    char unit = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    found.intel = __builtin_cpu_is("intel");
#endif
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    if (file >> part >> unit && part > 0 && unit == 'K') found.l3 = all > 0 ? std::min(all, part << 10) : part << 10;
    return found;
  }();
  return sizes;
}

}  // namespace fused_resnet
