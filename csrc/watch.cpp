#include "watch.h"

#include <algorithm>

#include "prefetch.h"

namespace fused_resnet {
namespace {

// A new reference that is given back.
class Answer {
 public:
  explicit Answer(PyObject* object) : object_(object) {}
  ~Answer() { Py_XDECREF(object_); }
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;
  PyObject* get() const { return object_; }
  // Numbers: -1 and an error for what is none.
  long number() const { return object_ == nullptr ? -1 : PyLong_AsLong(object_); }
  std::uintptr_t address() const { return object_ == nullptr ? 0 : std::uintptr_t(PyLong_AsUnsignedLongLong(object_)); }
  bool equals(PyObject* other) const { return object_ != nullptr && PyObject_RichCompareBool(object_, other, Py_EQ) == 1; }

 private:
  PyObject* object_;
};

// What an attribute of torch.Tensor is for this tensor.
PyObject* attribute(PyObject* descriptor, PyObject* tensor) {
  return Py_TYPE(descriptor)->tp_descr_get(descriptor, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
}

}  // namespace

bool Watch::is_where_it_was(Row& row) const {
  PyObject* const t = row.tensor;
  if (ask_.describe == nullptr) {
    return Answer(PyObject_CallOneArg(ask_.data_ptr, t)).address() == row.address && Answer(attribute(ask_.shape, t)).equals(row.shape) &&
           Answer(PyObject_CallOneArg(ask_.stride, t)).equals(row.strides) && Answer(attribute(ask_.dtype, t)).get() == row.dtype;
  }
  dlpack::Description d;
  if (ask_.describe(t, &d) != 0 || (d.ndim > 0 && d.strides == nullptr)) return false;  // no strides: before version 1.2
  row.near = d.shape;
  const std::int64_t* const layout = row.layout.data();
  const std::int32_t rank = static_cast<std::int32_t>(row.layout.size() / 2);
  return reinterpret_cast<std::uintptr_t>(d.data) + d.byte_offset == row.address && d.device_type == ask_.device_type && d.ndim == rank &&
         d.dtype.code == row.element.code && d.dtype.bits == row.element.bits && std::equal(layout, layout + rank, d.shape) &&
         std::equal(layout + rank, layout + 2 * rank, d.strides);
}

bool Watch::holds(Row& row, bool grad) const {
  if (Py_TYPE(row.tensor) != row.type || Answer(attribute(ask_.version, row.tensor)).number() != row.version || !is_where_it_was(row)) return false;
  return !grad || Answer(attribute(ask_.requires_grad, row.tensor)).get() == Py_False;
}

Py_ssize_t Watch::first_changed(bool grad) {
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (i + kPrefetched < rows_.size()) {
      const Row& later = rows_[i + kPrefetched];
      prefetch(later.tensor);
      // A tensor's shape lies among what else it says of itself, if it is short.
      const auto near = reinterpret_cast<std::uintptr_t>(later.near);
      for (const int line : {-1, 0, 1, 2}) prefetch(reinterpret_cast<const void*>(near + line * 64));
    }
    if (!holds(rows_[i], grad)) {
      PyErr_Clear();
      return Py_ssize_t(i);
    }
  }
  return -1;
}

}  // namespace fused_resnet
