#include "bindings/errors.h"

#include <exception>
#include <string>

#include "meshloom/core/error.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;

const char* class_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "InvalidArgument";
    case ErrorCode::kNotSupported:
      return "NotSupported";
    case ErrorCode::kPlan:
      return "PlanError";
    case ErrorCode::kComm:
      return "CommError";
    case ErrorCode::kTimeout:
      return "Timeout";
    case ErrorCode::kData:
      return "DataError";
    case ErrorCode::kIo:
      return "IoError";
  }
  return "Error";
}

void set_python_error(const Error& error) {
  const py::object type = py::module_::import("meshloom._errors").attr(class_name(error.code()));
  const py::object instance = type(error.what());
  instance.attr("where") = error.where();
  instance.attr("location") =
      std::string(error.location().file_name()) + ":" + std::to_string(error.location().line());
  PyErr_SetObject(type.ptr(), instance.ptr());
}

}  // namespace

void register_errors(py::module_& module) {
  (void)module;
  py::register_local_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const Error& error) {
      set_python_error(error);
    }
  });
}

}  // namespace meshloom::bindings
