#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "bindings/core/bindings.h"
#include "meshloom/comm/backends.h"
#include "meshloom/comm/communicator.h"
#include "meshloom/comm/torch_backend.h"
#include "meshloom/comm/watchdog.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;
using comm::CallOptions;
using comm::Communicator;
using comm::GroupOptions;
using comm::Work;
using Limit = std::optional<std::chrono::milliseconds>;
using Pieces = std::vector<std::pair<int, at::Tensor>>;
// A world that ends waits for its threads, and those may need the lock to let a tensor go.
template <class T>
struct DeleteUnlocked {
  void operator()(T* object) const {
    const py::gil_scoped_release unlocked;
    delete object;
  }
};
template <class T>
using Holder = std::unique_ptr<T, DeleteUnlocked<T>>;
using Unlocked = py::call_guard<py::gil_scoped_release>;

// CallOptions keeps a pointer: names live as long as the process, and there are few of them.
const char* interned(const std::string& purpose) {
  static std::mutex mutex;
  static std::set<std::string> names;
  const std::lock_guard lock(mutex);
  return names.insert(purpose).first->c_str();
}

CallOptions call_options(const Limit& timeout, const std::string& purpose) {
  CallOptions options;
  options.timeout = timeout;
  options.purpose = interned(purpose);
  return options;
}

std::vector<comm::Transfer> transfers(const Pieces& pieces) {
  std::vector<comm::Transfer> result;
  for (const auto& [peer, tensor] : pieces) result.push_back({peer, &tensor});
  return result;
}

void bind_options(py::module_& module) {
  py::class_<GroupOptions>(module, "GroupOptions", "What all groups of a world share.")
      .def(py::init([](const std::string& name, const Limit& timeout, bool deterministic) {
             GroupOptions options;
             options.name = name;
             options.timeout = timeout;
             options.deterministic = deterministic;
             return options;
           }),
           py::arg("name") = "world", py::arg("timeout") = py::none(),
           py::arg("deterministic") = false,
           "The timeout (seconds or a timedelta) limits calls that give none; without it "
           "MESHLOOM_TIMEOUT_SECONDS does.")
      .def_readwrite("name", &GroupOptions::name)
      .def_readwrite("timeout", &GroupOptions::timeout)
      .def_readwrite("deterministic", &GroupOptions::deterministic);
}

void bind_work(py::module_& module) {
  py::class_<Work, Holder<Work>>(module, "Work", "One started operation; copies share it.")
      .def("done", &Work::done, "True once the operation ended, well or badly. Never blocks.")
      .def("wait", &Work::wait, py::arg("limit") = py::none(), Unlocked(),
           "Blocks until the operation ends; the limit is in seconds or a timedelta.")
      .def("result", &Work::result, py::arg("limit") = py::none(), Unlocked(),
           "wait(), then the output of the operations that return one.");
}

void bind_traffic(py::module_& module) {
  py::class_<comm::TrafficEntry>(module, "TrafficEntry", "Bytes and calls under one purpose.")
      .def_readonly("calls", &comm::TrafficEntry::calls)
      .def_readonly("sent_bytes", &comm::TrafficEntry::sent_bytes)
      .def_readonly("received_bytes", &comm::TrafficEntry::received_bytes)
      .def_readonly("sent_to", &comm::TrafficEntry::sent_to)
      .def_readonly("seconds", &comm::TrafficEntry::seconds)
      .def_readonly("exposed_seconds", &comm::TrafficEntry::exposed_seconds);
  py::class_<comm::GroupTraffic>(module, "GroupTraffic", "One group's account.")
      .def_readonly("group", &comm::GroupTraffic::group)
      .def_readonly("ranks", &comm::GroupTraffic::ranks)
      .def_readonly("traffic", &comm::GroupTraffic::traffic);
}

void bind_communicator(py::module_& module) {
  py::enum_<comm::ReduceOp>(module, "ReduceOp")
      .value("SUM", comm::ReduceOp::kSum)
      .value("MAX", comm::ReduceOp::kMax)
      .value("MIN", comm::ReduceOp::kMin);
  const Limit none;
  const std::string other = "other";
  py::class_<Communicator, Holder<Communicator>>(
      module, "Communicator",
      "A group of ranks and its traffic. Collective calls start the operation "
      "and return a Work; all ranks make them in the same order.")
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("size", &Communicator::size)
      .def_property_readonly("name", &Communicator::name)
      .def_property_readonly("backend", &Communicator::backend)
      .def_property_readonly("deterministic", &Communicator::deterministic)
      .def(
          "all_reduce_",
          [](Communicator& self, at::Tensor tensor, comm::ReduceOp op, const Limit& timeout,
             const std::string& purpose) {
            return self.all_reduce_(tensor, op, call_options(timeout, purpose));
          },
          py::arg("tensor"), py::arg("op") = comm::ReduceOp::kSum, py::arg("timeout") = none,
          py::arg("purpose") = other, Unlocked(), "Element-wise reduction, in place.")
      .def(
          "all_gather",
          [](Communicator& self, const at::Tensor& input, const std::vector<std::int64_t>& rows,
             const Limit& timeout, const std::string& purpose) {
            return self.all_gather(input, rows, call_options(timeout, purpose));
          },
          py::arg("input"), py::arg("rows"), py::arg("timeout") = none, py::arg("purpose") = other,
          Unlocked(), "Every rank's rows, concatenated in rank order.")
      .def(
          "reduce_scatter",
          [](Communicator& self, const at::Tensor& input, const std::vector<std::int64_t>& rows,
             const Limit& timeout, const std::string& purpose) {
            return self.reduce_scatter(input, rows, call_options(timeout, purpose));
          },
          py::arg("input"), py::arg("rows"), py::arg("timeout") = none, py::arg("purpose") = other,
          Unlocked(), "Sum over ranks, of which this rank keeps its rows.")
      .def(
          "all_to_all",
          [](Communicator& self, const at::Tensor& input,
             const std::vector<std::int64_t>& send_rows, const std::vector<std::int64_t>& recv_rows,
             const Limit& timeout, const std::string& purpose) {
            return self.all_to_all(input, send_rows, recv_rows, call_options(timeout, purpose));
          },
          py::arg("input"), py::arg("send_rows"), py::arg("recv_rows"), py::arg("timeout") = none,
          py::arg("purpose") = other, Unlocked(), "Row blocks of input to all ranks.")
      .def(
          "broadcast_",
          [](Communicator& self, at::Tensor tensor, int root, const Limit& timeout,
             const std::string& purpose) {
            return self.broadcast_(tensor, root, call_options(timeout, purpose));
          },
          py::arg("tensor"), py::arg("root"), py::arg("timeout") = none, py::arg("purpose") = other,
          Unlocked(), "The root's tensor to all ranks, in place.")
      .def(
          "barrier",
          [](Communicator& self, const Limit& timeout, const std::string& purpose) {
            return self.barrier(call_options(timeout, purpose));
          },
          py::arg("timeout") = none, py::arg("purpose") = other, Unlocked())
      .def(
          "send_receive",
          [](Communicator& self, const Pieces& sends, const Pieces& receives, const Limit& timeout,
             const std::string& purpose) {
            return self.send_receive(transfers(sends), transfers(receives),
                                     call_options(timeout, purpose));
          },
          py::arg("sends"), py::arg("receives"), py::arg("timeout") = none,
          py::arg("purpose") = other, Unlocked(),
          "Grouped sends and receives, each a pair (peer, tensor); receives write in place.")
      .def("split", &Communicator::split, py::arg("color"), py::arg("key"), py::arg("name"),
           Unlocked(), "Groups by colour, ranks ordered by (key, rank); blocks.")
      .def_static(
          "from_process_group",
          // By reference: torch's own holder of a group differs between versions.
          [](c10d::ProcessGroup& group, const GroupOptions& options) {
            return comm::make_torch_world(
                c10::intrusive_ptr<c10d::ProcessGroup>::unsafe_reclaim_from_nonowning(&group),
                options);
          },
          py::arg("group"), py::arg("options") = GroupOptions(), Unlocked(),
          "A world over a torch.distributed group that carries CPU tensors, e.g. "
          "torch.distributed.group.WORLD. Collective.")
      .def_static(
          "from_env",
          [](const GroupOptions& options, const std::string& device) {
            return py::module_::import("meshloom._world").attr("world_from_env")(options, device);
          },
          py::arg("options") = GroupOptions(), py::arg("device") = "cpu",
          "The world that the launcher made: mpirun, torchrun, a Slurm step, or a world of one. "
          "With device 'cuda' it carries CUDA tensors by NCCL. MESHLOOM_BACKEND overrides.")
      .def("pending_report", &Communicator::pending_report, Unlocked(),
           "What this rank waits for now: a line a call, with the peers that are missing.")
      .def("report", &Communicator::report, Unlocked(),
           "What this rank waits for and did before, over its world and all its groups.")
      .def(
          "set_label",
          [](const Communicator& self, std::int64_t step, const std::string& instruction,
             std::int64_t slot, std::int64_t unit, const std::vector<std::int64_t>& samples) {
            self.recorder().set_label({step, instruction, slot, unit, samples});
          },
          py::arg("step") = -1, py::arg("instruction") = "", py::arg("slot") = -1,
          py::arg("unit") = -1, py::arg("samples") = std::vector<std::int64_t>(),
          "What this rank does from now on: kept with its calls and part of their errors.")
      .def(
          "flight_record", [](const Communicator& self) { return self.recorder().to_json(); },
          "The last calls of this rank over all groups of its world, as JSON.")
      .def("traffic", &Communicator::traffic, "Bytes handed to the transport, by purpose.")
      .def("reset_traffic", &Communicator::reset_traffic)
      .def("traffic_by_group", &Communicator::traffic_by_group,
           "The accounts of all groups of this group's world; ranks are the world's.")
      .def("abort", &Communicator::abort, py::arg("reason"), Unlocked(),
           "Ends every pending and future call on this rank with CommError.");
}

void bind_watchdog(py::module_& module) {
  using comm::Watchdog;
  using Patience = std::chrono::milliseconds;
  py::class_<Watchdog, Holder<Watchdog>>(module, "Watchdog",
                                         "Turns a hang of this rank into a report, once a hang.")
      .def(
          py::init([](const Communicator& world, Patience patience,
                      const std::function<void(const std::string&)>& on_hang,
                      const std::string& folder) {
            return Holder<Watchdog>(
                new Watchdog(world, comm::WatchdogOptions{patience, on_hang, folder}));
          }),
          py::arg("world"), py::arg("patience"), py::arg("on_hang"), py::arg("folder") = "",
          "on_hang(report) runs on a thread of the watchdog when a call is pending for longer than "
          "`patience` (seconds or a timedelta); the report and the flight record are written to "
          "`folder` too where one is given.")
      .def("reports", &Watchdog::reports, "Hangs reported so far.");
}

}  // namespace

void bind_comm(py::module_& module) {
  bind_options(module);
  bind_work(module);
  bind_traffic(module);
  bind_communicator(module);
  bind_watchdog(module);
  module.def("make_thread_world", &comm::make_thread_world, py::arg("size"),
             py::arg("options") = GroupOptions(), "Communicators of one process, one a thread.");
  module.def("run_thread_ranks", &comm::run_thread_ranks, py::arg("size"), py::arg("body"),
             py::arg("options") = GroupOptions(), py::arg("threads_per_rank") = 1, Unlocked(),
             "Runs body(communicator) on `size` threads and rethrows the first failure.");
  module.def("make_mpi_world", &comm::make_mpi_world, py::arg("options") = GroupOptions(),
             Unlocked(), "The process's place under mpirun.");
  module.def(
      "make_fake_world",
      [](int rank, int size, const GroupOptions& options) {
        return comm::make_fake_world(rank, size, options);
      },
      py::arg("rank"), py::arg("size"), py::arg("options") = GroupOptions(),
      "A rank of a world that moves nothing.");
  using Ctas = std::pair<int, int>;
  module.def(
      "make_nccl_world",
      [](const Communicator& bootstrap, int device, const GroupOptions& options,
         int max_communicators, const Ctas& ctas, const std::map<std::string, Ctas>& group_ctas) {
        comm::NcclOptions nccl;
        nccl.max_communicators = max_communicators;
        nccl.default_ctas = {ctas.first, ctas.second};
        for (const auto& [name, limits] : group_ctas) {
          nccl.ctas[name] = {limits.first, limits.second};
        }
        return comm::make_nccl_world(bootstrap, device, options, nccl);
      },
      py::arg("bootstrap"), py::arg("device"), py::arg("options") = GroupOptions(),
      py::arg("max_communicators") = comm::NcclOptions().max_communicators,
      py::arg("ctas") = Ctas(0, 0), py::arg("group_ctas") = std::map<std::string, Ctas>(),
      Unlocked(),
      "NCCL over CUDA devices, started over a world of the same ranks on the host. ctas: least and "
      "most multiprocessors of a communicator, 0 where NCCL decides; group_ctas: by group name.");
  module.def(
      "make_world",
      [](const GroupOptions& options) {
        return comm::make_world(Environment::from_process(), options);
      },
      py::arg("options") = GroupOptions(), Unlocked(), "What the launcher's variables say.");
}

}  // namespace meshloom::bindings
