#include "train/internal/collective.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace meshloom::train::detail {

namespace {

const comm::CallOptions kControl{.timeout = std::nullopt, .purpose = "control"};

/// Where a backend can move control tensors: NCCL moves device memory only.
at::Device control_device(const comm::Communicator& group) {
  return group.backend() == "nccl" ? at::Device(at::kCUDA) : at::Device(at::kCPU);
}

at::Tensor gathered(comm::Communicator& group, const at::Tensor& own,
                    const std::vector<std::int64_t>& rows) {
  return group.all_gather(own.to(control_device(group)), rows, kControl).result().cpu();
}

void broadcast(comm::Communicator& group, at::Tensor& tensor, int root) {
  at::Tensor moved = tensor.to(control_device(group));
  group.broadcast_(moved, root, kControl).wait();
  tensor = moved.cpu();
}

at::Tensor bytes_of(const std::string& text) {
  at::Tensor result = at::empty({static_cast<std::int64_t>(text.size())}, at::kByte);
  if (!text.empty()) std::memcpy(result.data_ptr(), text.data(), text.size());
  return result;
}

std::string text_of(const at::Tensor& bytes) {
  return {static_cast<const char*>(bytes.const_data_ptr()),
          static_cast<std::size_t>(bytes.numel())};
}

}  // namespace

LocalFailure current_failure() {
  try {
    throw;
  } catch (const Error& error) {
    const std::string text = error.what();
    const std::string prefix = fmt::format("[{}] ", error.where());
    return {error.code(), text.starts_with(prefix) ? text.substr(prefix.size()) : text};
  } catch (const std::exception& error) {
    return {ErrorCode::kData, error.what()};
  }
}

std::vector<std::string> gather_text(comm::Communicator& group, const std::string& text) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(group.size()), 1);
  at::Tensor size = at::empty({1}, at::kLong);
  size.fill_(static_cast<std::int64_t>(text.size()));
  const at::Tensor sizes = gathered(group, size, rows);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    rows[r] = sizes.const_data_ptr<std::int64_t>()[r];
  }
  const at::Tensor all = gathered(group, bytes_of(text), rows);
  const std::string joined = text_of(all);
  std::vector<std::string> result;
  std::size_t at = 0;
  for (const std::int64_t length : rows) {
    result.push_back(joined.substr(at, static_cast<std::size_t>(length)));
    at += static_cast<std::size_t>(length);
  }
  return result;
}

std::string broadcast_text(comm::Communicator& group, const std::string& text, int root) {
  at::Tensor size = at::empty({1}, at::kLong);
  size.fill_(static_cast<std::int64_t>(text.size()));
  broadcast(group, size, root);
  at::Tensor bytes = group.rank() == root
                         ? bytes_of(text)
                         : at::empty({*size.const_data_ptr<std::int64_t>()}, at::kByte);
  broadcast(group, bytes, root);
  return text_of(bytes);
}

std::vector<std::vector<double>> gather_numbers(comm::Communicator& group,
                                                const std::vector<double>& values) {
  const auto width = static_cast<std::int64_t>(values.size());
  at::Tensor own = at::empty({1, width}, at::kDouble);
  std::copy(values.begin(), values.end(), own.mutable_data_ptr<double>());
  const std::vector<std::int64_t> rows(static_cast<std::size_t>(group.size()), 1);
  const at::Tensor all = gathered(group, own, rows);
  std::vector<std::vector<double>> result;
  const double* data = all.const_data_ptr<double>();
  for (int r = 0; r < group.size(); ++r)
    result.emplace_back(data + r * width, data + (r + 1) * width);
  return result;
}

std::optional<LocalFailure> first_failure(comm::Communicator& group,
                                          const std::optional<LocalFailure>& own) {
  at::Tensor failed = at::zeros({1}, at::TensorOptions(at::kLong).device(control_device(group)));
  if (own) failed.fill_(1);
  group.all_reduce_(failed, comm::ReduceOp::kMax, kControl).wait();
  if (failed.item<std::int64_t>() == 0) return std::nullopt;
  std::string text;
  if (own) text = static_cast<char>('0' + static_cast<int>(own->code)) + own->message;
  const std::vector<std::string> all = gather_text(group, text);
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].empty()) continue;
    return LocalFailure{static_cast<ErrorCode>(all[r][0] - '0'),
                        group.size() > 1
                            ? fmt::format("rank {}/{}: {}", r, group.size(), all[r].substr(1))
                            : all[r].substr(1)};
  }
  return std::nullopt;
}

void agree(comm::Communicator& group, const char* where, const std::optional<LocalFailure>& own) {
  if (const auto failure = first_failure(group, own)) {
    throw_error(failure->code, where, failure->message);
  }
}

}  // namespace meshloom::train::detail
