#include "watch.h"

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

}  // namespace

bool Watch::holds(const Row& row, bool grad) const {
  PyObject* const t = PyDict_GetItemWithError(row.place, row.name);
  if (t != row.tensor) return false;
  if (t == Py_None) return true;
  if (Answer(PyObject_GetAttr(t, ask_.version)).number() != row.version) return false;
  if (Answer(PyObject_CallOneArg(ask_.data_ptr, t)).address() != row.address) return false;
  if (!Answer(PyObject_GetAttr(t, ask_.shape)).equals(row.shape)) return false;
  if (!Answer(PyObject_CallOneArg(ask_.stride, t)).equals(row.strides)) return false;
  if (Answer(PyObject_GetAttr(t, ask_.dtype)).get() != row.dtype) return false;
  return !grad || Answer(PyObject_GetAttr(t, ask_.requires_grad)).get() == Py_False;
}

Py_ssize_t Watch::first_changed(bool grad) const {
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (!holds(rows_[i], grad)) {
      PyErr_Clear();
      return Py_ssize_t(i);
    }
  }
  return -1;
}

}  // namespace fused_resnet
