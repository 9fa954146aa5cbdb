#pragma once

#include <string>
#include <utility>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/comm/flight_recorder.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/step_plan.h"

/// Where in a plan a rank is, for errors and the flight recorder, and what else its program holds.
namespace meshloom::parallel::detail {

/// "step 12, backward, slot 3, unit 1 (ranks 2,3,4; samples 17,40)"
[[nodiscard]] std::string describe(const plan::StepPlan& plan,
                                   const plan::Instruction& instruction);

[[nodiscard]] comm::Label label_of(const plan::StepPlan& plan,
                                   const plan::Instruction& instruction);

/// For every chunk the last instruction of a program that leaves weight gradients in it.
[[nodiscard]] std::vector<const plan::Instruction*> last_gradients(const plan::Program& program,
                                                                   int chunks);

/// The backward that follows an instruction of the program; null where a forward comes first.
[[nodiscard]] const plan::Instruction* backward_after(const plan::Program& program,
                                                      const plan::Instruction& instruction);

/// Says in the flight recorder what this rank is doing, and clears it however the step ends.
class RecorderLabel {
 public:
  explicit RecorderLabel(const comm::Communicator& world) : recorder_(world.recorder()) {}
  RecorderLabel(const RecorderLabel&) = delete;
  RecorderLabel& operator=(const RecorderLabel&) = delete;
  ~RecorderLabel() { recorder_.set_label({}); }
  void set(comm::Label label) { recorder_.set_label(std::move(label)); }

 private:
  comm::FlightRecorder& recorder_;
};

}  // namespace meshloom::parallel::detail
