// The CUDA kernels on the host, for tests on machines without a GPU: the same sources, compiled as C++. Only `launch` and
// `DeviceBlock` in block.h are not in here.
#include "general_bfloat16.cu"
#include "general_float16.cu"
#include "general_float32.cu"
#include "general_float64.cu"
#include "passes.cu"
