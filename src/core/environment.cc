#include "meshloom/core/environment.h"

#include <cstdlib>

#include "meshloom/core/check.h"

namespace meshloom {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

}  // namespace

Environment Environment::from_process() {
  Environment result;
  if (const auto text = variable("MESHLOOM_TIMEOUT_SECONDS"); !text.empty()) {
    char* end = nullptr;
    const double seconds = std::strtod(text.c_str(), &end);
    MESHLOOM_CHECK(*end == '\0' && seconds > 0 && seconds < 1e9, "core.environment",
                   "MESHLOOM_TIMEOUT_SECONDS is \"" + text + "\", expected a positive number");
    result.timeout = std::chrono::milliseconds(static_cast<long long>(seconds * 1000));
  }
  if (const auto text = variable("MESHLOOM_LOG"); !text.empty()) result.log_level = text;
  result.backend = variable("MESHLOOM_BACKEND");
  result.cpu = variable("MESHLOOM_CPU");
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK"}) {
    result.under_mpi = result.under_mpi || !variable(name).empty();
  }
  return result;
}

}  // namespace meshloom
