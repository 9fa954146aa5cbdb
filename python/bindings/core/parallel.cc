#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "bindings/core/bindings.h"
#include "meshloom/comm/communicator.h"
#include "meshloom/core/error.h"
#include "meshloom/data/source.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/parallel/executor.h"
#include "meshloom/parallel/sample_batch.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;
using Unlocked = py::call_guard<py::gil_scoped_release>;

/// This rank's share of one unit: its tokens, and attention over the documents they belong to.
class UnitShare {
 public:
  UnitShare(const plan::StepPlan& plan, int slot, int unit, const comm::Communicator& hdp,
            const std::map<std::int64_t, data::Document>& documents, const at::Device& device) {
    const plan::Unit& placed =
        plan.slots.at(static_cast<std::size_t>(slot)).units.at(static_cast<std::size_t>(unit));
    const auto own = std::find(placed.ranks.begin(), placed.ranks.end(), hdp.rank());
    if (own == placed.ranks.end()) {
      throw InvalidArgument("parallel.unit_share", "rank " + std::to_string(hdp.rank()) +
                                                       " is not in slot " + std::to_string(slot) +
                                                       ", unit " + std::to_string(unit));
    }
    const parallel::SampleLoader load = [&](std::int64_t sample) {
      const auto found = documents.find(sample);
      if (found == documents.end()) {
        throw InvalidArgument("parallel.unit_share",
                              "no document for sample " + std::to_string(sample));
      }
      return parallel::SampleTokens{found->second.tokens, found->second.loss_mask};
    };
    batch_ = parallel::build_batch(plan, placed, static_cast<int>(own - placed.ranks.begin()), load,
                                   device);
    attention_ = parallel::make_exchange(hdp, placed, {});
  }

  [[nodiscard]] const model::SequenceBatch& batch() const { return batch_; }

  std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, double scale,
                                            std::int64_t window) {
    check(q);
    auto result = attention_->forward(q, k, v, batch_, {.scale = scale, .window = window});
    return {std::move(result.out), std::move(result.lse)};
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
      const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
      const at::Tensor& out, const at::Tensor& lse, double scale, std::int64_t window) {
    auto result = attention_->backward(dout, q, k, v, {.out = out, .lse = lse}, batch_,
                                       {.scale = scale, .window = window});
    return {std::move(result.dq), std::move(result.dk), std::move(result.dv)};
  }

 private:
  void check(const at::Tensor& q) const {
    if (q.dim() != 3 || q.size(0) != batch_.size()) {
      throw InvalidArgument(
          "parallel.unit_share",
          "q has " + std::to_string(q.dim()) + " dimensions and " +
              std::to_string(q.dim() > 0 ? q.size(0) : 0) +
              " rows, expected [T, heads, head_dim] with T = " + std::to_string(batch_.size()));
    }
  }

  model::SequenceBatch batch_;
  std::unique_ptr<model::AttentionExchange> attention_;
};

}  // namespace

void bind_parallel(py::module_& module) {
  py::class_<UnitShare, std::shared_ptr<UnitShare>>(
      module, "UnitShare",
      "This rank's share of one unit. All ranks of the unit make the same calls, in the same "
      "order.")
      .def(py::init<const plan::StepPlan&, int, int, const comm::Communicator&,
                    const std::map<std::int64_t, data::Document>&, const at::Device&>(),
           py::arg("plan"), py::arg("slot"), py::arg("unit"), py::arg("hdp"), py::arg("documents"),
           py::arg("device"), Unlocked())
      .def_property_readonly("tokens", [](const UnitShare& self) { return self.batch().tokens; })
      .def_property_readonly("positions",
                             [](const UnitShare& self) { return self.batch().positions; })
      .def_property_readonly("labels", [](const UnitShare& self) { return self.batch().labels; })
      .def("attention_forward", &UnitShare::forward, py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("scale"), py::arg("window"), Unlocked(),
           "(out [T, Hq, D], lse [Hq, T]) of causal attention over whole documents.")
      .def("attention_backward", &UnitShare::backward, py::arg("dout"), py::arg("q"), py::arg("k"),
           py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("scale"), py::arg("window"),
           Unlocked(), "(dq, dk, dv).");
}

}  // namespace meshloom::bindings
