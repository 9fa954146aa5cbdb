#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>

#include "meshloom/core/error.h"

namespace meshloom::bindings {

/// `T(**fields)`: default-constructed, then every keyword assigned to the bound attribute.
template <class T>
auto keyword_init(const char* where) {
  return pybind11::init([where](const pybind11::kwargs& fields) {
    auto value = std::make_unique<T>();
    const pybind11::object view =
        pybind11::cast(value.get(), pybind11::return_value_policy::reference);
    for (const auto& [key, field] : fields) {
      if (!pybind11::hasattr(view, key)) {
        throw InvalidArgument(where, "there is no field " + pybind11::cast<std::string>(key));
      }
      pybind11::setattr(view, key, field);
    }
    return value;
  });
}

/// Deletes without the interpreter lock: the destructors concerned wait for threads that may need
/// it.
struct UnlockedDelete {
  template <class T>
  void operator()(T* value) const {
    if (PyGILState_Check() == 0) {
      delete value;
      return;
    }
    const pybind11::gil_scoped_release release;
    delete value;
  }
};

/// The same object, whose last owner lets go of it as UnlockedDelete does.
template <class T>
std::shared_ptr<T> released_unlocked(std::shared_ptr<T> value) {
  T* raw = value.get();
  auto* holder = new std::shared_ptr<T>(std::move(value));
  return std::shared_ptr<T>(raw, [holder](T*) { UnlockedDelete()(holder); });
}

}  // namespace meshloom::bindings
