#include "meshloom/parallel/stage_state.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>

#include "meshloom/core/check.h"

namespace meshloom::parallel {
namespace {

constexpr comm::CallOptions kCollectCall{.timeout = std::nullopt, .purpose = "collect"};
constexpr int kReplicated = -1;

/// The parameters of the whole that member `owner` holds: kReplicated names those of no expert.
bool belongs(const model::ParameterSpec& spec, const ExpertMap& map, int owner) {
  return owner == kReplicated ? spec.expert < 0
                              : spec.expert >= 0 && map.owner(spec.expert) == owner;
}

model::ParameterTable part_of(const model::ParameterTable& whole, const ExpertMap& map, int owner) {
  model::ParameterTable result;
  for (const model::ParameterSpec& spec : whole.parameters) {
    if (belongs(spec, map, owner)) result.append(spec);
  }
  return result;
}

StageState::Part make_part(model::ParameterTable table, const comm::Communicator& group,
                           at::ScalarType compute, at::Device device) {
  Zero1 zero(table, group, compute, device);
  return {.table = std::move(table), .zero = std::move(zero)};
}

}  // namespace

ParameterState::~ParameterState() = default;

/// Hands every call on to the part that has the parameter.
class StageState::Router final : public model::ParameterSource, public model::WeightGradSink {
 public:
  explicit Router(StageState& state) : state_(state) {}

  at::Tensor acquire(const model::ParameterHandle& handle) override {
    const auto [part, local] = state_.locate(handle);
    return flat(part).acquire(local);
  }
  void release(const model::ParameterHandle& handle) override {
    const auto [part, local] = state_.locate(handle);
    flat(part).release(local);
  }
  void linear(const model::ParameterHandle& handle, const at::Tensor& dy,
              const at::Tensor& x) override {
    const auto [part, local] = state_.locate(handle);
    flat(part).linear(local, dy, x);
  }
  void grouped_linear(const model::ParameterHandle& handle, const at::Tensor& dy,
                      const at::Tensor& x, const std::vector<std::int64_t>& rows) override {
    const auto [part, local] = state_.locate(handle);
    flat(part).grouped_linear(local, dy, x, rows);
  }
  void embedding(const model::ParameterHandle& handle, const at::Tensor& ids,
                 const at::Tensor& dy) override {
    const auto [part, local] = state_.locate(handle);
    flat(part).embedding(local, ids, dy);
  }
  void add(const model::ParameterHandle& handle, const at::Tensor& value) override {
    const auto [part, local] = state_.locate(handle);
    flat(part).add(local, value);
  }

 private:
  model::FlatParameters& flat(std::size_t part) { return state_.parts_[part].zero.parameters(); }

  StageState& state_;
};

StageState::StageState(const model::ParameterTable& table, comm::Communicator hdp,
                       const std::optional<ExpertParallel>& experts, at::ScalarType compute,
                       at::Device device)
    : table_(table),
      hdp_(std::move(hdp)),
      experts_(experts),
      compute_(compute),
      device_(device),
      router_(std::make_unique<Router>(*this)) {
  if (!experts_) {
    parts_.push_back(make_part(table_, hdp_, compute, device));
    return;
  }
  const ExpertMap& map = experts_->map;
  const int own = experts_->group.rank();
  for (const model::ParameterSpec& spec : table_.parameters) {
    MESHLOOM_CHECK(spec.expert < map.experts(), "parallel.stage_state",
                   fmt::format("\"{}\" belongs to expert {}, the map has {}", spec.name,
                               spec.expert, map.experts()));
  }
  parts_.reserve(2);
  parts_.push_back(make_part(part_of(table_, map, kReplicated), hdp_, compute, device));
  parts_.push_back(make_part(part_of(table_, map, own), experts_->replicas, compute, device));
  for (const std::size_t part : {0, 1}) {
    std::int64_t elements = 0;
    for (const model::ParameterSpec& spec : table_.parameters) {
      before_[part].push_back(elements);
      if (belongs(spec, map, part == 0 ? kReplicated : own)) elements += spec.elements();
    }
    before_[part].push_back(elements);
  }
}

StageState::~StageState() = default;

model::ParameterSource& StageState::source() { return *router_; }
model::WeightGradSink& StageState::sink() { return *router_; }

std::pair<std::size_t, model::ParameterHandle> StageState::locate(
    const model::ParameterHandle& handle) const {
  if (!experts_) return {0, handle};
  const auto index_at = [&](std::int64_t offset) {
    const auto found = std::partition_point(
        table_.parameters.begin(), table_.parameters.end(),
        [&](const model::ParameterSpec& spec) { return spec.offset < offset; });
    return static_cast<std::size_t>(found - table_.parameters.begin());
  };
  std::int64_t count = 1;
  for (const std::int64_t extent : handle.shape) count *= extent;
  const std::size_t first = index_at(handle.offset);
  const std::size_t last = index_at(handle.offset + count);
  MESHLOOM_CHECK(first < last && table_.parameters[first].offset == handle.offset,
                 "parallel.stage_state", "a handle that begins inside a parameter");
  const std::size_t part = table_.parameters[first].expert < 0 ? 0 : 1;
  model::ParameterHandle local = handle;
  local.offset = before_[part][first];
  if (part == 1) {
    // Experts are the first dimension; this rank's follow one another in its own flat space.
    const std::int64_t expert = count / handle.shape.front();
    local.shape.front() = (before_[part][last] - before_[part][first]) / expert;
  }
  return {part, std::move(local)};
}

void StageState::zero_gradients() {
  for (Part& part : parts_) part.zero.zero_gradients();
}

void StageState::reduce() {
  for (Part& part : parts_) part.zero.reduce();
}

void StageState::gather() {
  for (Part& part : parts_) part.zero.gather();
}

void StageState::assign(const at::Tensor& full) {
  MESHLOOM_CHECK_EQ(full.numel(), table_.elements, "parallel.stage_state.assign", "elements");
  if (!experts_) {
    parts_.front().zero.assign(full);
    return;
  }
  for (Part& part : parts_) {
    at::Tensor own = at::empty({part.table.elements}, full.options());
    for (const model::ParameterSpec& spec : part.table.parameters) {
      own.narrow(0, spec.offset, spec.elements())
          .copy_(full.narrow(0, table_.find(spec.name).offset, spec.elements()));
    }
    part.zero.assign(own);
  }
}

std::int64_t StageState::expert_elements(int owner) const {
  std::int64_t elements = 0;
  for (const model::ParameterSpec& spec : table_.parameters) {
    if (belongs(spec, experts_->map, owner)) elements += spec.elements();
  }
  return elements;
}

void StageState::place(at::Tensor& full, const at::Tensor& flat, int owner) const {
  std::int64_t at = 0;
  for (const model::ParameterSpec& spec : table_.parameters) {
    if (!belongs(spec, experts_->map, owner)) continue;
    full.narrow(0, spec.offset, spec.elements()).copy_(flat.narrow(0, at, spec.elements()));
    at += spec.elements();
  }
}

at::Tensor StageState::whole_gradients() {
  for (Part& part : parts_) part.zero.reduce_to_all();
  const at::Tensor& replicated = parts_.front().zero.gradients();
  if (!experts_) return replicated;
  const at::Tensor& own = parts_.back().zero.gradients();
  std::vector<std::int64_t> rows;
  for (int owner = 0; owner < experts_->map.ranks(); ++owner) {
    rows.push_back(expert_elements(owner));
  }
  const at::Tensor all = experts_->group.all_gather(own, rows, kCollectCall).result();
  at::Tensor full = at::empty({table_.elements}, replicated.options());
  place(full, replicated, kReplicated);
  std::int64_t begin = 0;
  for (int owner = 0; owner < experts_->map.ranks(); ++owner) {
    const std::int64_t count = rows[static_cast<std::size_t>(owner)];
    place(full, all.narrow(0, begin, count), owner);
    begin += count;
  }
  return full;
}

at::Tensor StageState::whole_values() {
  const bool root = hdp_.rank() == 0;
  const at::Tensor& replicated = parts_.front().zero.values();
  if (!experts_) return root ? replicated : at::Tensor();
  // The members of rank 0's group have all experts between them.
  const int members = experts_->map.ranks();
  if (hdp_.rank() >= members) return {};
  const at::Tensor& own = parts_.back().zero.values();
  if (!root) {
    const comm::Transfer send{.peer = 0, .tensor = &own};
    experts_->group.send_receive({&send, 1}, {}, kCollectCall).wait();
    return {};
  }
  std::vector<at::Tensor> experts{own};
  std::vector<comm::Transfer> receives;
  experts.reserve(static_cast<std::size_t>(members));
  for (int owner = 1; owner < members; ++owner) {
    experts.push_back(at::empty({expert_elements(owner)}, own.options()));
    receives.push_back({.peer = owner, .tensor = &experts.back()});
  }
  experts_->group.send_receive({}, receives, kCollectCall).wait();
  at::Tensor full = at::empty({table_.elements}, replicated.options());
  place(full, replicated, kReplicated);
  for (int owner = 0; owner < members; ++owner) {
    place(full, experts[static_cast<std::size_t>(owner)], owner);
  }
  return full;
}

}  // namespace meshloom::parallel
