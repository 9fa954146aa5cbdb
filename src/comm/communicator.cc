#include "meshloom/comm/communicator.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "comm/internal/group.h"
#include "comm/internal/reduce.h"
#include "comm/internal/staging.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace {

using detail::GroupImpl;
using detail::Operation;
using detail::Request;

std::string who(const GroupImpl& group) {
  return fmt::format("rank {}/{} group \"{}\"", group.info().rank, group.info().size,
                     group.info().name);
}

[[noreturn]] void refuse(const GroupImpl& group, Operation operation, const std::string& text) {
  throw InvalidArgument(std::string("comm.") + detail::name_of(operation),
                        who(group) + ": " + text);
}

void check_tensor(const GroupImpl& group, Operation operation, const char* what,
                  const at::Tensor& tensor) {
  if (!tensor.defined()) refuse(group, operation, fmt::format("{} is undefined", what));
  if (!detail::is_supported(tensor.scalar_type())) {
    refuse(
        group, operation,
        fmt::format("{} has dtype {}, expected float64, float32, bfloat16, float16, int64, int32 "
                    "or uint8",
                    what, c10::toString(tensor.scalar_type())));
  }
  if (!tensor.is_contiguous()) {
    refuse(
        group, operation,
        fmt::format("{} of sizes [{}] is not contiguous", what, fmt::join(tensor.sizes(), ", ")));
  }
  // Over a host backend tensors of a device are staged.
  const bool fits =
      group.device().is_cpu() ? !tensor.is_meta() : tensor.device().type() == group.device().type();
  if (!fits) {
    refuse(group, operation,
           fmt::format("{} is on {}, expected {} (backend {})", what, tensor.device().str(),
                       group.device().str(), group.backend()));
  }
}

void check_rows(const GroupImpl& group, Operation operation, const char* what,
                std::span<const std::int64_t> rows) {
  if (std::ssize(rows) != group.info().size) {
    refuse(group, operation,
           fmt::format("{} has {} entries, expected one a rank", what, rows.size()));
  }
  for (const std::int64_t count : rows) {
    if (count < 0) refuse(group, operation, fmt::format("{} holds {}, expected >= 0", what, count));
  }
}

void check_row_count(const GroupImpl& group, Operation operation, const std::string& what,
                     std::int64_t given, const at::Tensor& input) {
  if (input.dim() < 1) refuse(group, operation, "input is a scalar, expected [rows, ...]");
  if (input.size(0) != given) {
    refuse(group, operation, fmt::format("{} {}, input has {} rows", what, given, input.size(0)));
  }
}

at::Tensor rows_like(const at::Tensor& input, std::int64_t rows) {
  auto sizes = input.sizes().vec();
  sizes[0] = rows;
  return at::empty(sizes, input.options());
}

std::int64_t bytes_of(const at::Tensor& tensor) {
  return static_cast<std::int64_t>(tensor.nbytes());
}

std::vector<detail::Message> check_transfers(const GroupImpl& group, const char* what,
                                             std::span<const Transfer> transfers) {
  std::vector<detail::Message> result;
  result.reserve(transfers.size());
  for (const Transfer& transfer : transfers) {
    if (transfer.peer < 0 || transfer.peer >= group.info().size) {
      refuse(group, Operation::kSendReceive,
             fmt::format("peer of a {} is {}, expected 0 <= peer < {}", what, transfer.peer,
                         group.info().size));
    }
    if (transfer.tensor == nullptr) {
      refuse(group, Operation::kSendReceive, fmt::format("tensor of a {} is null", what));
    }
    check_tensor(group, Operation::kSendReceive, what, *transfer.tensor);
    result.push_back({transfer.peer, *transfer.tensor});
  }
  return result;
}

// What the call moves, by the rules in traffic.h.
TrafficEntry traffic_of(const Request& request, int rank, int size) {
  TrafficEntry entry;
  entry.calls = 1;
  const std::int64_t others = size - 1;
  switch (request.operation) {
    case Operation::kAllReduce:
      entry.sent_bytes = entry.received_bytes = 2 * bytes_of(request.input) * others / size;
      break;
    case Operation::kAllGather:
      entry.sent_bytes = bytes_of(request.input) * others;
      entry.received_bytes = bytes_of(request.output) - bytes_of(request.input);
      break;
    case Operation::kReduceScatter:
      entry.sent_bytes = bytes_of(request.input) - bytes_of(request.output);
      entry.received_bytes = bytes_of(request.output) * others;
      break;
    case Operation::kBroadcast:
      (rank == request.root ? entry.sent_bytes : entry.received_bytes) =
          bytes_of(request.input) * (rank == request.root ? others : 1);
      break;
    case Operation::kAllToAll: {
      const std::int64_t row = detail::row_bytes(request.input);
      for (int peer = 0; peer < size; ++peer) {
        if (peer == rank) continue;
        if (request.send_rows[peer] > 0) entry.sent_to[peer] = request.send_rows[peer] * row;
        entry.sent_bytes += request.send_rows[peer] * row;
        entry.received_bytes += request.recv_rows[peer] * row;
      }
      break;
    }
    case Operation::kBarrier:
      break;
    case Operation::kSendReceive:
      for (const auto& send : request.sends) {
        if (send.peer == rank) continue;
        entry.sent_bytes += bytes_of(send.tensor);
        entry.sent_to[send.peer] += bytes_of(send.tensor);
      }
      for (const auto& receive : request.receives) {
        if (receive.peer != rank) entry.received_bytes += bytes_of(receive.tensor);
      }
      break;
  }
  return entry;
}

void add(TrafficEntry& total, const TrafficEntry& entry) {
  total.calls += entry.calls;
  total.sent_bytes += entry.sent_bytes;
  total.received_bytes += entry.received_bytes;
  for (const auto& [peer, bytes] : entry.sent_to) total.sent_to[peer] += bytes;
}

}  // namespace

Communicator::Communicator(std::shared_ptr<GroupImpl> impl) : impl_(std::move(impl)) {
  if (!impl_) throw InvalidArgument("comm.communicator", "the group is null");
  impl_->info().groups->add(impl_);
}

int Communicator::rank() const { return impl_->info().rank; }
int Communicator::size() const { return impl_->info().size; }
const std::string& Communicator::name() const { return impl_->info().name; }
std::string Communicator::backend() const { return impl_->backend(); }
bool Communicator::deterministic() const { return impl_->info().deterministic; }
FlightRecorder& Communicator::recorder() const { return *impl_->info().recorder; }
std::string Communicator::aborted() const { return impl_->abort_reason(); }
void Communicator::abort(const std::string& reason) noexcept { impl_->abort(reason); }

Work Communicator::start(const Request& request, const CallOptions& options) {
  const auto& info = impl_->info();
  Request numbered = request;
  detail::use_aliases(numbered);
  std::optional<detail::Staging> staging;
  if (impl_->device().is_cpu()) staging = detail::Staging::begin(numbered);
  numbered.sequence =
      request.operation == Operation::kSendReceive ? impl_->exchanges++ : impl_->collectives++;
  const TrafficEntry entry = traffic_of(request, info.rank, info.size);
  const std::string purpose = options.purpose != nullptr ? options.purpose : "other";
  {
    const std::lock_guard lock(impl_->account->mutex);
    add(impl_->account->traffic[purpose], entry);
  }
  OperationRecord record;
  record.group = info.name;
  record.rank = info.rank;
  record.size = info.size;
  record.operation = detail::name_of(request.operation);
  record.purpose = purpose;
  record.sequence = numbered.sequence;
  record.sent_bytes = entry.sent_bytes;
  record.received_bytes = entry.received_bytes;
  for (const auto& send : request.sends) record.peers.push_back(send.peer);
  for (const auto& receive : request.receives) record.peers.push_back(receive.peer);
  std::sort(record.peers.begin(), record.peers.end());
  record.peers.erase(std::unique(record.peers.begin(), record.peers.end()), record.peers.end());
  const std::int64_t id = info.recorder->begin(std::move(record));

  auto work =
      std::make_shared<detail::WorkImpl>(impl_, std::move(numbered), std::move(staging), purpose,
                                         options.timeout.value_or(info.timeout), id);
  impl_->track(work);
  impl_->start(work);
  return Work(std::move(work));
}

Work Communicator::all_reduce_(at::Tensor& tensor, ReduceOp op, const CallOptions& options) {
  check_tensor(*impl_, Operation::kAllReduce, "tensor", tensor);
  Request request;
  request.operation = Operation::kAllReduce;
  request.reduce = op;
  request.input = tensor;
  request.output = tensor;
  return start(request, options);
}

Work Communicator::all_gather(const at::Tensor& input, std::span<const std::int64_t> rows,
                              const CallOptions& options) {
  const auto operation = Operation::kAllGather;
  check_tensor(*impl_, operation, "input", input);
  check_rows(*impl_, operation, "rows", rows);
  check_row_count(*impl_, operation, "rows of this rank are", rows[rank()], input);
  Request request;
  request.operation = operation;
  request.recv_rows.assign(rows.begin(), rows.end());
  request.input = input;
  request.output = rows_like(input, detail::sum(request.recv_rows));
  return start(request, options);
}

Work Communicator::reduce_scatter(const at::Tensor& input, std::span<const std::int64_t> rows,
                                  const CallOptions& options) {
  const auto operation = Operation::kReduceScatter;
  check_tensor(*impl_, operation, "input", input);
  check_rows(*impl_, operation, "rows", rows);
  Request request;
  request.operation = operation;
  request.send_rows.assign(rows.begin(), rows.end());
  check_row_count(*impl_, operation, "rows sum to", detail::sum(request.send_rows), input);
  request.input = input;
  request.output = rows_like(input, rows[rank()]);
  return start(request, options);
}

Work Communicator::all_to_all(const at::Tensor& input, std::span<const std::int64_t> send_rows,
                              std::span<const std::int64_t> recv_rows, const CallOptions& options) {
  const auto operation = Operation::kAllToAll;
  check_tensor(*impl_, operation, "input", input);
  check_rows(*impl_, operation, "send_rows", send_rows);
  check_rows(*impl_, operation, "recv_rows", recv_rows);
  Request request;
  request.operation = operation;
  request.send_rows.assign(send_rows.begin(), send_rows.end());
  request.recv_rows.assign(recv_rows.begin(), recv_rows.end());
  check_row_count(*impl_, operation, "send_rows sums to", detail::sum(request.send_rows), input);
  if (send_rows[rank()] != recv_rows[rank()]) {
    refuse(*impl_, operation,
           fmt::format("send_rows of this rank to itself is {}, recv_rows {}", send_rows[rank()],
                       recv_rows[rank()]));
  }
  request.input = input;
  request.output = rows_like(input, detail::sum(request.recv_rows));
  return start(request, options);
}

Work Communicator::broadcast_(at::Tensor& tensor, int root, const CallOptions& options) {
  check_tensor(*impl_, Operation::kBroadcast, "tensor", tensor);
  if (root < 0 || root >= size()) {
    refuse(*impl_, Operation::kBroadcast,
           fmt::format("root is {}, expected 0 <= root < {}", root, size()));
  }
  Request request;
  request.operation = Operation::kBroadcast;
  request.root = root;
  request.input = tensor;
  request.output = tensor;
  return start(request, options);
}

Work Communicator::barrier(const CallOptions& options) { return start(Request{}, options); }

Work Communicator::send_receive(std::span<const Transfer> sends, std::span<const Transfer> receives,
                                const CallOptions& options) {
  Request request;
  request.operation = Operation::kSendReceive;
  request.sends = check_transfers(*impl_, "send", sends);
  request.receives = check_transfers(*impl_, "receive", receives);
  return start(request, options);
}

std::optional<Communicator> Communicator::split(int color, int key, const std::string& name) {
  const auto votes = impl_->gather_votes(color, key, name);
  GroupImpl::SplitPlace place;
  place.number = impl_->splits++;
  place.color = color;
  place.name = name;
  for (int r = 0; r < size(); ++r) {
    if (votes[r].color == color) place.members.push_back(r);
    place.token = std::max(place.token, votes[r].token);
  }
  std::stable_sort(place.members.begin(), place.members.end(),
                   [&](int a, int b) { return votes[a].key < votes[b].key; });
  const auto own = std::find(place.members.begin(), place.members.end(), rank());
  place.rank = static_cast<int>(own - place.members.begin());
  auto child = impl_->make_child(color < 0 ? std::nullopt : std::optional(place));
  if (!child) return std::nullopt;
  child->ranks_of_world = place.members;
  if (!impl_->ranks_of_world.empty()) {
    for (int& member : child->ranks_of_world) member = impl_->ranks_of_world[member];
  }
  return Communicator(std::move(child));
}

Traffic Communicator::traffic() const {
  const std::lock_guard lock(impl_->account->mutex);
  return impl_->account->traffic;
}

void Communicator::reset_traffic() {
  const std::lock_guard lock(impl_->account->mutex);
  impl_->account->traffic.clear();
}

std::vector<GroupTraffic> Communicator::traffic_by_group() const {
  std::vector<GroupTraffic> result;
  for (const auto& group : impl_->info().groups->groups()) {
    GroupTraffic entry{.group = group->info().name, .ranks = group->ranks_of_world, .traffic = {}};
    if (entry.ranks.empty()) {
      entry.ranks.resize(static_cast<std::size_t>(group->info().size));
      std::iota(entry.ranks.begin(), entry.ranks.end(), 0);
    }
    const std::lock_guard lock(group->account->mutex);
    entry.traffic = group->account->traffic;
    result.push_back(std::move(entry));
  }
  return result;
}

std::string Communicator::pending_report() const { return impl_->pending_report(); }

std::string Communicator::report() const {
  constexpr std::ptrdiff_t kLastCalls = 12;
  std::string waits;
  for (const auto& group : impl_->info().groups->groups()) waits += group->pending_report();
  const auto doing = impl_->info().recorder->doing();
  std::string result = fmt::format("{}, backend {}{}{}\n", who(*impl_), backend(),
                                   doing->empty() ? "" : ", in ", *doing);
  result += waits.empty() ? "waits for nothing\n" : "waits for:\n" + waits;
  const auto records = impl_->info().recorder->records();
  result += fmt::format("last {} of {} calls kept:\n", std::min(std::ssize(records), kLastCalls),
                        records.size());
  const auto first = records.size() - std::min<std::size_t>(records.size(), kLastCalls);
  for (std::size_t i = first; i < records.size(); ++i) result += to_text(records[i]) + '\n';
  return result;
}

}  // namespace meshloom::comm
