// Facts: what a decision was made on, checked in one pass before each use of it.
#pragma once

#include <Python.h>

#include <vector>

namespace fused_resnet {

// The kinds of facts; fused_resnet/graph/facts.py numbers them alike and says what each means.
enum class FactKind { item, absent, empty, contents, list, type, lookup, function, cell, kind };

// Borrows every object: whoever makes Facts holds the rows that the objects came from for as long.
//
// The pass runs no Python code: dictionaries have string keys, values are compared by identity or, for the types whose equality is
// built in, by value. The caller holds the GIL.
class Facts {
 public:
  struct Fact {
    FactKind kind;
    PyObject* place;  // nullptr stands for the owner's dictionary
    PyObject* name;
    PyObject* value;  // nullptr: of a lookup, that nothing is found
  };

  explicit Facts(std::vector<Fact> facts);

  // To be checked after these: what a decision about another object was made on. owner: that object's dictionary.
  void include(Facts& other, PyObject* owner) { included_.push_back({&other, owner}); }

  // The number of the first fact that does not hold, or -1; those of included ones follow. owner: the dictionary of the object that the facts are about.
  Py_ssize_t first_broken(PyObject* owner);

 private:
  struct Class {
    PyTypeObject* type;
    unsigned int version;  // CPython's, when the lookups in the class held last; 0: not known
  };

  struct Included {
    Facts* facts;
    PyObject* owner;
  };

  bool classes_are_as_they_were() const;
  Py_ssize_t first_broken_own(PyObject* owner);

  std::vector<Fact> facts_;
  std::vector<Py_ssize_t> others_;  // the numbers of the facts that are no lookups
  std::vector<Class> classes_;      // of the lookups
  std::vector<Included> included_;
};

}  // namespace fused_resnet
