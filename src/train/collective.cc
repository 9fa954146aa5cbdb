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
  const at::Tensor sizes = group.all_gather(size, rows, kControl).result();
  for (std::size_t r = 0; r < rows.size(); ++r) {
    rows[r] = sizes.const_data_ptr<std::int64_t>()[r];
  }
  const at::Tensor all = group.all_gather(bytes_of(text), rows, kControl).result();
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
  group.broadcast_(size, root, kControl).wait();
  at::Tensor bytes = group.rank() == root
                         ? bytes_of(text)
                         : at::empty({*size.const_data_ptr<std::int64_t>()}, at::kByte);
  group.broadcast_(bytes, root, kControl).wait();
  return text_of(bytes);
}

std::vector<std::vector<double>> gather_numbers(comm::Communicator& group,
                                                const std::vector<double>& values) {
  const auto width = static_cast<std::int64_t>(values.size());
  at::Tensor own = at::empty({1, width}, at::kDouble);
  std::copy(values.begin(), values.end(), own.mutable_data_ptr<double>());
  const std::vector<std::int64_t> rows(static_cast<std::size_t>(group.size()), 1);
  const at::Tensor all = group.all_gather(own, rows, kControl).result();
  std::vector<std::vector<double>> result;
  const double* data = all.const_data_ptr<double>();
  for (int r = 0; r < group.size(); ++r)
    result.emplace_back(data + r * width, data + (r + 1) * width);
  return result;
}

std::optional<LocalFailure> first_failure(comm::Communicator& group,
                                          const std::optional<LocalFailure>& own) {
  at::Tensor failed = at::zeros({1}, at::kLong);
  if (own) failed.fill_(1);
  group.all_reduce_(failed, comm::ReduceOp::kMax, kControl).wait();
  if (*failed.const_data_ptr<std::int64_t>() == 0) return std::nullopt;
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
