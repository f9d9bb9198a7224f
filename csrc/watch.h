// Watch: whether the tensors that something was derived from are there, and as they were then, in one pass.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace fused_resnet {

// How a tensor is asked: by methods and attributes, and no layout of its object is known here.
struct TensorQuestions {
  PyObject *data_ptr, *stride;                        // methods of torch.Tensor
  PyObject *version, *shape, *dtype, *requires_grad;  // names of attributes
};

// Borrows every object: whoever makes a Watch holds the rows that the objects came from for as long. The caller holds the GIL, and nobody
// listens to what tensors are asked (no mode, no tracing).
class Watch {
 public:
  struct Row {
    PyObject *place, *name;  // the dictionary that holds the tensor under this name
    PyObject* tensor;        // None: there is none
    long version;
    std::uintptr_t address;
    PyObject *shape, *strides, *dtype;
  };

  Watch(std::vector<Row> rows, const TensorQuestions& ask) : rows_(std::move(rows)), ask_(ask) {}

  // The number of the first tensor that is another one, was written or moved, or, with `grad`, wants a gradient; -1: none. A tensor that
  // cannot be asked counts as changed.
  Py_ssize_t first_changed(bool grad) const;

 private:
  bool holds(const Row& row, bool grad) const;

  std::vector<Row> rows_;
  TensorQuestions ask_;
};

}  // namespace fused_resnet
