#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/model/batch.h"
#include "meshloom/plan/exchange_traffic.h"
#include "parallel/internal/unit_exchange.h"

namespace meshloom::parallel::detail {

/// The tokens of a head group on one rank: rows arrive member by member, attention wants them
/// document by document.
struct GroupTokens {
  model::SequenceBatch batch;       ///< the group's share of every document; no token ids
  std::vector<std::int64_t> rows;   ///< of each member of the group
  std::vector<std::int64_t> begin;  ///< where each member's rows arrive
  at::Tensor by_document;           ///< int64 [T]: arrival row of each row of the batch
  at::Tensor by_arrival;            ///< int64 [T]: its inverse
};

/// @param degree  of the unit @param group  members of a head group @param index  of this group
[[nodiscard]] GroupTokens group_tokens(const model::SequenceBatch& batch, int degree, int group,
                                       int index, const at::Device& device);

/// Tensors with query heads and with K/V heads that travel side by side in one message, in this
/// order; [T, heads, D] each, of one dtype and D.
struct HeadColumns {
  std::vector<at::Tensor> by_query;
  std::vector<at::Tensor> by_key_value;
};

/// The all-to-all of one head group: heads of own tokens against own heads of all tokens. Buffers
/// are named by the caller, so that several sets may be under way in one grouped call.
class HeadGroup {
 public:
  using Shares = std::vector<plan::HeadShare>;

  /// @param ranks  of the group's members, on the axis of the communicator @param part  own place
  HeadGroup(std::vector<int> ranks, int part, std::shared_ptr<ExchangeBuffers> buffers)
      : ranks_(std::move(ranks)), part_(part), buffers_(std::move(buffers)) {}

  /// Every member's part of the heads.
  [[nodiscard]] Shares shares(std::int64_t heads, std::int64_t kv_heads) const;
  [[nodiscard]] int part() const { return part_; }

  /// Puts heads on their way to who computes with them. @param type  of the message
  /// @returns where they arrive: [T of the group, own columns, D], by arrival.
  at::Tensor to_heads(Parcel& parcel, const HeadColumns& columns, const Shares& shares,
                      const GroupTokens& tokens, at::ScalarType type, Buffer sent, Buffer received);

  /// Puts `columns` [T of the group, own columns, D], by arrival, on their way home.
  /// @param queries, key_values  how many tensors of each kind are side by side
  /// @returns [own T, columns of the member, D] of every member, filled when the call ends.
  std::vector<at::Tensor> to_tokens(Parcel& parcel, const at::Tensor& columns, int queries,
                                    int key_values, const Shares& shares, const GroupTokens& tokens,
                                    Buffer received);

  /// rows[order[i]] for all i, in a buffer.
  at::Tensor ordered(const at::Tensor& rows, const at::Tensor& order, Buffer name);

 private:
  std::vector<int> ranks_;
  int part_;
  std::shared_ptr<ExchangeBuffers> buffers_;
};

}  // namespace meshloom::parallel::detail
