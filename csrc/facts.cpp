#include "facts.h"

#include <algorithm>
#include <utility>

namespace fused_resnet {
namespace {

// Whether two values are one object, or equal and of one type whose equality runs no Python code.
bool same(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (a == nullptr || b == nullptr || Py_TYPE(a) != Py_TYPE(b)) return false;
  if (PyLong_CheckExact(a) || PyFloat_CheckExact(a) || PyUnicode_CheckExact(a)) return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
  if (!PyTuple_CheckExact(a) || PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a); ++i) {
    if (!same(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i))) return false;
  }
  return true;
}

// What a dictionary holds under a string, or nullptr.
PyObject* item(PyObject* dict, PyObject* name) { return PyDict_GetItemWithError(dict, name); }

// Whether the dictionary holds these names with these values in this order, and nothing else.
bool has_contents(PyObject* dict, PyObject* names, PyObject* values) {
  if (PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(names)) return false;
  // PyDict_Next does not know the order of an OrderedDict whose items were moved.
  if (!PyDict_CheckExact(dict)) {
    PyObject* keys = PyMapping_Keys(dict);
    bool equal = keys != nullptr && PyList_GET_SIZE(keys) == PyTuple_GET_SIZE(names);
    for (Py_ssize_t i = 0; equal && i < PyTuple_GET_SIZE(names); ++i) {
      equal = same(PyList_GET_ITEM(keys, i), PyTuple_GET_ITEM(names, i)) &&
              same(item(dict, PyTuple_GET_ITEM(names, i)), PyTuple_GET_ITEM(values, i));
    }
    Py_XDECREF(keys);
    PyErr_Clear();
    return equal;
  }
  Py_ssize_t at = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &at, &key, &value); ++i) {
    if (!same(key, PyTuple_GET_ITEM(names, i)) || !same(value, PyTuple_GET_ITEM(values, i))) return false;
  }
  return true;
}

// Whether the object is there and of one of these classes, not of one derived from them.
bool is_one_of(PyObject* object, PyObject* classes) {
  for (Py_ssize_t i = 0; object != nullptr && i < PyTuple_GET_SIZE(classes); ++i) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == PyTuple_GET_ITEM(classes, i)) return true;
  }
  return false;
}

bool has_items(PyObject* list, PyObject* values) {
  if (PyList_GET_SIZE(list) != PyTuple_GET_SIZE(values)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values); ++i) {
    if (!same(PyList_GET_ITEM(list, i), PyTuple_GET_ITEM(values, i))) return false;
  }
  return true;
}

bool holds(const Facts::Fact& f, PyObject* place) {
  switch (f.kind) {
    case FactKind::item:
      return same(item(place, f.name), f.value);
    case FactKind::absent:
      return item(place, f.name) == nullptr;
    case FactKind::empty: {
      PyObject* there = item(place, f.name);
      return there != nullptr && PyDict_Check(there) && PyDict_GET_SIZE(there) == 0;
    }
    case FactKind::contents:
      return has_contents(place, f.name, f.value);
    case FactKind::list:
      return has_items(place, f.value);
    case FactKind::type: {
      if (reinterpret_cast<PyObject*>(Py_TYPE(place)) != f.value) return false;
      if (f.name == Py_None) return true;
      PyObject* attributes = PyObject_GenericGetDict(place, nullptr);
      const bool equal = attributes == f.name;
      Py_XDECREF(attributes);
      if (attributes == nullptr) PyErr_Clear();
      return equal;
    }
    case FactKind::lookup:
      return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(place), f.name) == f.value;
    case FactKind::function: {
      PyObject* defaults = PyFunction_GET_DEFAULTS(place);
      PyObject* keywords = PyFunction_GET_KW_DEFAULTS(place);
      return PyFunction_GET_CODE(place) == f.name && (defaults == nullptr ? Py_None : defaults) == PyTuple_GET_ITEM(f.value, 0) &&
             (keywords == nullptr ? Py_None : keywords) == PyTuple_GET_ITEM(f.value, 1);
    }
    case FactKind::cell:
      return PyCell_GET(place) == f.value;
    case FactKind::kind:
      return is_one_of(item(place, f.name), f.value);
  }
  return false;
}

// A number that no other state of this class or of its bases has had, or 0: a change of any attribute of theirs takes it away
// (Objects/typeobject.c, PyType_Modified), and a lookup gives another.
unsigned int version_of(PyTypeObject* type) {
  return PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) ? type->tp_version_tag : 0;
}

}  // namespace

Facts::Facts(std::vector<Fact> facts) : facts_(std::move(facts)) {
  for (std::size_t i = 0; i < facts_.size(); ++i) {
    if (facts_[i].kind != FactKind::lookup) {
      others_.push_back(static_cast<Py_ssize_t>(i));
      continue;
    }
    auto* type = reinterpret_cast<PyTypeObject*>(facts_[i].place);
    if (std::none_of(classes_.begin(), classes_.end(), [type](const Class& c) { return c.type == type; })) classes_.push_back({type, 0});
  }
}

bool Facts::classes_are_as_they_were() const {
  return std::all_of(classes_.begin(), classes_.end(), [](const Class& c) { return c.version != 0 && version_of(c.type) == c.version; });
}

Py_ssize_t Facts::first_broken(PyObject* owner) {
  const Py_ssize_t own = first_broken_own(owner);
  if (own >= 0) return own;
  Py_ssize_t before = static_cast<Py_ssize_t>(facts_.size());
  for (const Included& included : included_) {
    const Py_ssize_t found = included.facts->first_broken(included.owner);
    if (found >= 0) return before + found;
    before += static_cast<Py_ssize_t>(included.facts->facts_.size());
  }
  return -1;
}

Py_ssize_t Facts::first_broken_own(PyObject* owner) {
  const auto broken = [this, owner](Py_ssize_t i) {
    const Fact& f = facts_[static_cast<std::size_t>(i)];
    return !holds(f, f.place == nullptr ? owner : f.place);
  };
  if (classes_are_as_they_were()) {
    const auto found = std::find_if(others_.begin(), others_.end(), broken);
    return found == others_.end() ? -1 : *found;
  }
  for (Py_ssize_t i = 0; i < static_cast<Py_ssize_t>(facts_.size()); ++i) {
    if (broken(i)) return i;
  }
  for (Class& c : classes_) c.version = version_of(c.type);
  return -1;
}

}  // namespace fused_resnet
