// What is used of DLPack's C exchange interface, version 1.3 (https://dmlc.github.io/dlpack/latest/c_api.html): a stable binary interface,
// which torch.Tensor offers as the capsule `__dlpack_c_exchange_api__`.
#pragma once

#include <Python.h>

#include <cstdint>

namespace fused_resnet::dlpack {

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

// DLTensor. shape and strides belong to the tensor, strides count elements.
struct Description {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

// DLPackDLTensorFromPyObjectNoSync: 0, or -1 and a Python error.
using Describe = int (*)(void* tensor, Description* out);

// DLPackExchangeAPI. The interface changes with the major version only.
struct Exchange {
  std::uint32_t major, minor;
  Exchange* older;
  void* allocate;
  void* export_managed;
  void* import_managed;
  Describe describe;  // may be nullptr
  void* stream;
};

inline constexpr std::int32_t kCpu = 1, kCuda = 2;

// How to describe a tensor, from the class's capsule; nullptr where it is none of this version.
inline Describe describe_of(PyObject* capsule) {
  auto* exchange = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (exchange == nullptr) PyErr_Clear();
  while (exchange != nullptr && exchange->major != 1) exchange = exchange->major > 1 ? exchange->older : nullptr;
  return exchange == nullptr ? nullptr : exchange->describe;
}

}  // namespace fused_resnet::dlpack
