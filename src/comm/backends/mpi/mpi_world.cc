#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include "comm/backends/mpi/mpi_engine.h"
#include "comm/internal/child_group.h"
#include "comm/internal/group.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace detail {
namespace {

class MpiGroup final : public GroupImpl {
 public:
  MpiGroup(GroupInfo info, std::shared_ptr<MpiEngine> engine, std::shared_ptr<MpiGroupState> state)
      : GroupImpl(std::move(info)), engine_(std::move(engine)), state_(std::move(state)) {}

  [[nodiscard]] std::string backend() const override { return "mpi"; }

  void start(const std::shared_ptr<WorkImpl>& work) override {
    {
      const std::lock_guard lock(state_->mutex);
      if (state_->aborted) {
        work->fail("aborted: " + state_->reason);
        return;
      }
    }
    engine_->start(state_, work);
  }

  void abort(const std::string& reason) noexcept override { engine_->abort(state_, reason, true); }

  [[nodiscard]] std::string abort_reason() override {
    const std::lock_guard lock(state_->mutex);
    return state_->aborted && state_->reason.empty() ? "no reason given" : state_->reason;
  }

  [[nodiscard]] std::vector<int> missing(const WorkImpl& work) override {
    return engine_->missing(work);
  }

  void waiting(int change) override { engine_->waiting(change); }

  [[nodiscard]] std::int32_t split_token() override { return engine_->propose_split_id(); }

  [[nodiscard]] std::shared_ptr<GroupImpl> make_child(
      const std::optional<SplitPlace>& place) override {
    if (!place) return nullptr;
    engine_->take_split_id(place->token);
    if (place->token >= engine_->id_limit()) {
      throw CommError("comm.split",
                      fmt::format("rank {}/{} group \"{}\": this MPI has tags for {} groups, all "
                                  "are taken",
                                  info().rank, info().size, info().name, engine_->id_limit()));
    }
    std::vector<int> members = world_ranks(state_->members, place->members);
    // Read before the move: arguments are evaluated in any order.
    const int size = static_cast<int>(members.size());
    auto child = make(engine_, child_info(info(), place->name, place->rank, size), place->token,
                      std::move(members));
    attach_child(*state_, *child, child->state_);
    return child;
  }

  static std::shared_ptr<MpiGroup> make(const std::shared_ptr<MpiEngine>& engine, GroupInfo info,
                                        int id, std::vector<int> members) {
    auto state = std::make_shared<MpiGroupState>();
    state->id = id;
    state->rank = info.rank;
    state->members = std::move(members);
    auto group = std::make_shared<MpiGroup>(std::move(info), engine, state);
    state->group = group;
    engine->add_group(state);
    return group;
  }

 private:
  std::shared_ptr<MpiEngine> engine_;
  std::shared_ptr<MpiGroupState> state_;
};

}  // namespace
}  // namespace detail

Communicator make_mpi_world(const GroupOptions& options) {
  if (!Environment::from_process().under_mpi) return make_thread_world(1, options).front();
  auto info = detail::make_info(options, 0, 1);
  const auto engine = detail::MpiEngine::of_process(info.timeout);
  info.rank = engine->rank();
  info.size = engine->size();
  info.deterministic = true;
  std::vector<int> members;
  for (int r = 0; r < engine->size(); ++r) members.push_back(r);
  return Communicator(
      detail::MpiGroup::make(engine, std::move(info), engine->next_world_id(), std::move(members)));
}

}  // namespace meshloom::comm
