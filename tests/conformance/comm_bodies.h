#pragma once

#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"

/// The communicator's contract as test bodies. Every rank of a world runs the same body;
/// expectations are gtest's. A body leaves its world usable: what breaks a group does so on a group
/// split off.
namespace meshloom::comm::conformance {

struct Body {
  std::string name;
  void (*run)(Communicator& comm);
};

/// Shapes, argument checks, accounting: all backends.
[[nodiscard]] std::vector<Body> shape_bodies();
/// What arrives where: all backends that move data.
[[nodiscard]] std::vector<Body> data_bodies();
/// Time limits, aborts, ranks that disagree: backends whose groups can be split and that move data.
[[nodiscard]] std::vector<Body> failure_bodies();

}  // namespace meshloom::comm::conformance
