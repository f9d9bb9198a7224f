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

  // The number of the first fact that does not hold, or -1. owner: the dictionary of the object that the facts are about.
  Py_ssize_t first_broken(PyObject* owner) const;

 private:
  std::vector<Fact> facts_;
};

}  // namespace fused_resnet
