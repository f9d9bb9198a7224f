// Which instruction sets this machine runs, and the one in force.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fused_resnet {

struct CacheSizes {
  i64 l1d = 32 << 10, l2 = 1 << 20, l3 = 8 << 20;  // bytes; what is assumed where the system does not say
  bool intel = false;                              // whose they are
};

std::vector<const KernelTable*> available_tables();  // the best one last
const KernelTable& current_table();
void set_isa(const std::string& name);  // throws std::invalid_argument that names the choices
const CacheSizes& cache_sizes();

}  // namespace fused_resnet
