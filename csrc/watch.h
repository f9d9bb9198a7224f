// Watch: whether the tensors that something was derived from are as they were then, in one pass.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "dlpack.h"

namespace fused_resnet {

// How a tensor is asked; no layout of its object is known here. Where torch offers DLPack's C interface (2.10), one call tells all but
// the version and requires_grad; else methods and attributes do.
struct TensorQuestions {
  dlpack::Describe describe;                          // nullptr: torch does not offer it
  PyObject *data_ptr, *stride;                        // methods of torch.Tensor
  PyObject *version, *shape, *dtype, *requires_grad;  // its attributes' descriptors
  std::int32_t device_type;                           // where they must be, as DLPack says it
};

// Borrows every object: whoever makes a Watch holds the rows that the objects came from for as long. The caller holds the GIL, and nobody
// listens to what tensors are asked (no mode, no tracing).
class Watch {
 public:
  struct Row {
    PyObject* tensor;
    PyTypeObject* type;
    long version;
    std::uintptr_t address;
    PyObject *shape, *strides, *dtype;
    std::vector<std::int64_t> layout;  // shape and strides as numbers, one behind the other
    dlpack::DataType element;          // dtype as DLPack says it
    const void* near = nullptr;        // where the shape was the last time: a hint, for prefetching
  };

  Watch(std::vector<Row> rows, const TensorQuestions& ask) : rows_(std::move(rows)), ask_(ask) {}

  // The number of the first tensor that was written or moved or, with `grad`, wants a gradient; -1: none. A tensor that cannot be asked
  // counts as changed.
  Py_ssize_t first_changed(bool grad);

 private:
  bool holds(Row& row, bool grad) const;
  bool is_where_it_was(Row& row) const;  // address, shape, strides and dtype

  std::vector<Row> rows_;
  TensorQuestions ask_;
};

}  // namespace fused_resnet
