// Facts: what a decision was made on, checked in one pass before each use of it.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace fused_resnet {

// The kinds of facts; fused_resnet/graph/facts.py numbers them alike and says what each means.
enum class FactKind { item, absent, empty, contents, list, type, lookup, function, cell, kind };

// Borrows every object: whoever makes Facts holds the rows that the objects came from for as long.
//
// The pass runs no Python code: dictionaries have string keys, values are compared by identity or, for the types whose equality is
// built in, by value. The caller holds the GIL.
//
// What a decision was made on is hardly ever in a cache when the decision is used again: a network's call goes through more memory than
// that. So each object is looked at once, however many facts are about it, and is prefetched before; and a dictionary whose version
// (PEP 509: no two states of dictionaries have the same) is the one of the last time is not looked into.
class Facts {
 public:
  struct Fact {
    FactKind kind;
    PyObject* place;  // nullptr stands for the owner's dictionary
    PyObject* name;
    PyObject* value;  // nullptr: of a lookup, that nothing is found
  };

  explicit Facts(std::vector<Fact> facts) : facts_(std::move(facts)) {}

  // To be checked with these: what a decision about another object was made on. owner: that object's dictionary. Throws std::logic_error
  // after the first pass.
  void include(const Facts& other, PyObject* owner);

  // The number of a fact that does not hold, or -1. Those that were included are numbered behind these. owner: the dictionary of the object
  // that the facts are about, or of a copy of it.
  Py_ssize_t broken(PyObject* owner);

 private:
  // The facts about one dictionary: a range of `inside_`.
  struct Place {
    PyObject* dictionary;   // nullptr: the owner's
    std::uint64_t version;  // when its facts held last, and nothing was looked at since; 0: not known
    std::size_t first, end;
  };

  // What a dictionary holds under a name, where the fact is about that object: it is an empty dictionary, or of some class.
  struct Held {
    Py_ssize_t fact;
    PyObject* object;       // alive as long as the version of the dictionary is the one of its place
    std::uint64_t version;  // of an empty dictionary
    PyTypeObject* type;     // of an object
  };

  struct Inside {
    Py_ssize_t fact;
    std::size_t held;  // its number in `held_`, if it is such a fact
  };

  struct Class {
    PyTypeObject* type;
    unsigned int version;  // CPython's, when the lookups in the class held last; 0: not known
  };

  void arrange();
  Py_ssize_t find_broken(PyObject* owner);
  bool holds_inside(const Inside& inside, PyObject* dictionary);
  bool holds(Held& held) const;
  bool classes_are_as_they_were() const;
  const Fact& fact(Py_ssize_t number) const { return facts_[static_cast<std::size_t>(number)]; }

  std::vector<Fact> facts_;
  bool arranged_ = false;
  std::vector<Place> places_;
  std::vector<Inside> inside_;
  std::vector<Held> held_;
  std::vector<Py_ssize_t> others_;   // the numbers of the facts about objects that are no dictionaries
  std::vector<Py_ssize_t> lookups_;  // ... and in classes
  std::vector<Class> classes_;       // of the lookups
};

}  // namespace fused_resnet
