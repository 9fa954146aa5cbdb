#include "parallel/internal/unit_exchange.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/plan/slicing.h"

namespace meshloom::parallel::detail {

int member_index(const comm::Communicator& hdp, const std::vector<int>& ranks, const char* where) {
  const auto own = std::find(ranks.begin(), ranks.end(), hdp.rank());
  MESHLOOM_CHECK(
      own != ranks.end(), where,
      fmt::format("rank {} is not in the unit's ranks [{}]", hdp.rank(), fmt::join(ranks, ", ")));
  return static_cast<int>(own - ranks.begin());
}

std::int64_t member_rows(const model::SequenceBatch& batch, int degree, int member) {
  std::int64_t rows = 0;
  for (const auto& document : batch.documents) {
    for (const auto& range : plan::member_ranges(document.length, degree, member)) {
      rows += range.size();
    }
  }
  return rows;
}

std::vector<model::AttentionBlock> blocks_against(const model::SequenceBatch& batch, int degree,
                                                  int member, std::int64_t window) {
  std::vector<model::AttentionBlock> blocks;
  std::int64_t q_row = 0;
  std::int64_t k_row = 0;
  for (const auto& document : batch.documents) {
    const auto keys = plan::member_ranges(document.length, degree, member);
    for (const auto& query : document.ranges) {
      std::int64_t k_begin = k_row;
      for (const auto& key : keys) {
        const bool causal = key.begin < query.end;
        const bool near = window == 0 || key.end - 1 > query.begin - window;
        if (query.size() > 0 && key.size() > 0 && causal && near) {
          blocks.push_back({.q_begin = q_row,
                            .q_rows = query.size(),
                            .q_position = query.begin,
                            .k_begin = k_begin,
                            .k_rows = key.size(),
                            .k_position = key.begin});
        }
        k_begin += key.size();
      }
      q_row += query.size();
    }
    for (const auto& key : keys) k_row += key.size();
  }
  return blocks;
}

std::int64_t key_value_elements(std::int64_t rows, const at::Tensor& k, const at::Tensor& v) {
  return rows * k.size(1) * (k.size(2) + v.size(2));
}

KeyValues key_values_in(at::Tensor buffer, std::int64_t rows, const at::Tensor& k,
                        const at::Tensor& v) {
  const std::int64_t keys = rows * k.size(1) * k.size(2);
  const std::int64_t values = rows * v.size(1) * v.size(2);
  KeyValues result;
  result.k = buffer.narrow(0, 0, keys).view({rows, k.size(1), k.size(2)});
  result.v = buffer.narrow(0, keys, values).view({rows, v.size(1), v.size(2)});
  result.both = std::move(buffer);
  return result;
}

at::ScalarType statistics_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Flight post(comm::Communicator& hdp, std::span<const comm::Transfer> sends,
            std::span<const comm::Transfer> receives) {
  const auto now = std::chrono::steady_clock::now();
  return {
      .work = hdp.send_receive(sends, receives, {.timeout = std::nullopt, .purpose = "exchange"}),
      .posted = now};
}

void finish(Flight& flight, const SpanSink& spans) {
  const auto waiting = std::chrono::steady_clock::now();
  flight.work.wait();
  if (!spans) return;
  const auto now = std::chrono::steady_clock::now();
  spans(Span::Kind::kExchange, flight.posted, now);
  spans(Span::Kind::kWait, waiting, now);
}

}  // namespace meshloom::parallel::detail
