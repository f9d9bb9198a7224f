#include "facts.h"

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "prefetch.h"

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

// A fact of a dictionary's own entries, or of what it holds: to be looked at again only when the dictionary, or the object that it holds,
// has changed.
bool is_inside(const Facts::Fact& f) {
  if (f.place != nullptr && !PyDict_Check(f.place)) return false;
  switch (f.kind) {
    case FactKind::item:
    case FactKind::absent:
    case FactKind::empty:
    case FactKind::kind: return true;
    // The order of an OrderedDict is not the dictionary's own.
    case FactKind::contents: return f.place == nullptr || PyDict_CheckExact(f.place);
    default: return false;
  }
}

bool is_held(FactKind kind) { return kind == FactKind::empty || kind == FactKind::kind; }

// The other facts; of entries only those of what is no dictionary, though it stands in the place of one: never.
bool holds_outside(const Facts::Fact& f, PyObject* place) {
  switch (f.kind) {
    case FactKind::contents: return PyDict_Check(place) && has_contents(place, f.name, f.value);
    case FactKind::list: return has_items(place, f.value);
    case FactKind::type: {
      if (reinterpret_cast<PyObject*>(Py_TYPE(place)) != f.value) return false;
      if (f.name == Py_None) return true;
      PyObject* attributes = PyObject_GenericGetDict(place, nullptr);
      const bool equal = attributes == f.name;
      Py_XDECREF(attributes);
      if (attributes == nullptr) PyErr_Clear();
      return equal;
    }
    case FactKind::function: {
      PyObject* defaults = PyFunction_GET_DEFAULTS(place);
      PyObject* keywords = PyFunction_GET_KW_DEFAULTS(place);
      return PyFunction_GET_CODE(place) == f.name && (defaults == nullptr ? Py_None : defaults) == PyTuple_GET_ITEM(f.value, 0) &&
             (keywords == nullptr ? Py_None : keywords) == PyTuple_GET_ITEM(f.value, 1);
    }
    case FactKind::cell: return PyCell_GET(place) == f.value;
    default: return false;
  }
}

bool holds_in_class(const Facts::Fact& f) { return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(f.place), f.name) == f.value; }

// A number that no other state of any dictionary has had, or 0 where Python does not promise one.
std::uint64_t version_of([[maybe_unused]] PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#else
  return 0;
#endif
}

// A number that no other state of this class or of its bases has had, or 0: a change of any attribute of theirs takes it away
// (Objects/typeobject.c, PyType_Modified), and a lookup gives another.
unsigned int version_of(PyTypeObject* type) {
  return PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) ? type->tp_version_tag : 0;
}

// What tells a fact from others: equal facts are checked once.
auto identity(const Facts::Fact& f) {
  PyObject *first = f.value, *second = nullptr;
  if (f.kind == FactKind::function) {
    first = PyTuple_GET_ITEM(f.value, 0);
    second = PyTuple_GET_ITEM(f.value, 1);
  }
  return std::make_tuple(f.kind, f.place, f.name, first, second);
}

}  // namespace

void Facts::include(const Facts& other, PyObject* owner) {
  if (arranged_) throw std::logic_error("facts are included before the first pass");
  for (Fact f : other.facts_) {
    if (f.place == nullptr) f.place = owner;
    facts_.push_back(f);
  }
}

void Facts::arrange() {
  std::set<decltype(identity(facts_[0]))> seen;
  std::map<PyObject*, std::size_t> number;  // of a dictionary's place
  std::vector<std::vector<Py_ssize_t>> inside;
  for (Py_ssize_t i = 0; i < static_cast<Py_ssize_t>(facts_.size()); ++i) {
    const Fact& f = fact(i);
    if (!seen.insert(identity(f)).second) continue;
    if (is_inside(f)) {
      const auto [found, is_new] = number.try_emplace(f.place, places_.size());
      if (is_new) {
        places_.push_back({f.place, 0, 0, 0});
        inside.emplace_back();
      }
      inside[found->second].push_back(i);
    } else if (f.kind == FactKind::lookup) {
      lookups_.push_back(i);
      auto* type = reinterpret_cast<PyTypeObject*>(f.place);
      if (std::none_of(classes_.begin(), classes_.end(), [type](const Class& c) { return c.type == type; })) classes_.push_back({type, 0});
    } else {
      others_.push_back(i);
    }
  }
  for (std::size_t p = 0; p < places_.size(); ++p) {
    places_[p].first = inside_.size();
    for (const Py_ssize_t i : inside[p]) {
      inside_.push_back({i, held_.size()});
      if (is_held(fact(i).kind)) held_.push_back({i, nullptr, 0, nullptr});
    }
    places_[p].end = inside_.size();
  }
  arranged_ = true;
}

bool Facts::holds_inside(const Inside& inside, PyObject* dictionary) {
  const Fact& f = fact(inside.fact);
  switch (f.kind) {
    case FactKind::item: return same(item(dictionary, f.name), f.value);
    case FactKind::absent: return item(dictionary, f.name) == nullptr;
    case FactKind::contents: return has_contents(dictionary, f.name, f.value);
    default: break;
  }
  Held& held = held_[inside.held];
  held = {inside.fact, item(dictionary, f.name), 0, nullptr};
  return holds(held);
}

bool Facts::holds(Held& held) const {
  const Fact& f = fact(held.fact);
  if (held.object == nullptr) return false;
  if (f.kind == FactKind::kind) {
    if (Py_TYPE(held.object) == held.type) return true;
    if (!is_one_of(held.object, f.value)) return false;
    held.type = Py_TYPE(held.object);
    return true;
  }
  if (!PyDict_Check(held.object)) return false;
  const std::uint64_t version = version_of(held.object);
  if (version != 0 && version == held.version) return true;
  if (PyDict_GET_SIZE(held.object) != 0) return false;
  held.version = version;
  return true;
}

bool Facts::classes_are_as_they_were() const {
  return std::all_of(classes_.begin(), classes_.end(), [](const Class& c) { return c.version != 0 && version_of(c.type) == c.version; });
}

Py_ssize_t Facts::broken(PyObject* owner) {
  if (!arranged_) arrange();
  const Py_ssize_t found = find_broken(owner);
  if (found >= 0) PyErr_Clear();
  return found;
}

Py_ssize_t Facts::find_broken(PyObject* owner) {
  for (std::size_t p = 0; p < places_.size(); ++p) {
    if (p + kPrefetched < places_.size()) prefetch(places_[p + kPrefetched].dictionary);
    Place& place = places_[p];
    PyObject* const dictionary = place.dictionary == nullptr ? owner : place.dictionary;
    const std::uint64_t version = version_of(dictionary);
    if (version != 0 && version == place.version) continue;
    place.version = 0;  // until all hold: what is held is then this dictionary's, which may be another owner's
    for (std::size_t i = place.first; i < place.end; ++i) {
      if (!holds_inside(inside_[i], dictionary)) return inside_[i].fact;
    }
    place.version = version;
  }
  for (std::size_t h = 0; h < held_.size(); ++h) {
    if (h + kPrefetched < held_.size()) prefetch(held_[h + kPrefetched].object);
    if (!holds(held_[h])) return held_[h].fact;
  }
  for (std::size_t i = 0; i < others_.size(); ++i) {
    if (i + kPrefetched < others_.size()) prefetch(fact(others_[i + kPrefetched]).place);
    const Fact& f = fact(others_[i]);
    if (!holds_outside(f, f.place == nullptr ? owner : f.place)) return others_[i];
  }
  if (classes_are_as_they_were()) return -1;
  for (const Py_ssize_t i : lookups_) {
    if (!holds_in_class(fact(i))) return i;
  }
  for (Class& c : classes_) c.version = version_of(c.type);
  return -1;
}

}  // namespace fused_resnet
