#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/token_dispatcher.h"
#include "meshloom/parallel/expert_parallel.h"
#include "meshloom/parallel/span.h"

namespace meshloom::parallel {

/// Dropless dispatch over an expert-parallel group: rows travel by variable all-to-all to the rank
/// that holds their expert and back. Sizes are exchanged first, so a rank without tokens, or
/// without experts, takes part like any other. Rows arrive in order of their experts' places,
/// within an expert by sender and then by (token, choice); results are combined at home in the
/// order of a token's choices, so sums over experts round as on one rank. All members make the same
/// calls.
///
/// A failed call leaves the group aborted.
class MESHLOOM_API ExpertDispatcher final : public model::TokenDispatcher {
 public:
  /// @param group  the expert-parallel group
  /// @param maps   of each decoder layer, for as many members; outlive the dispatcher
  /// @param spans  told of every wait; may be empty
  ExpertDispatcher(comm::Communicator group, const std::vector<ExpertMap>& maps,
                   SpanSink spans = {});

  model::DispatchedTokens dispatch(const at::Tensor& x, const at::Tensor& experts,
                                   model::ExpertLayer of) override;
  /// Sizes are exchanged before it returns.
  model::Arrival<model::DispatchedTokens> begin_dispatch(const at::Tensor& x,
                                                         const at::Tensor& experts,
                                                         model::ExpertLayer of) override;
  [[nodiscard]] bool keeps_rows() const override { return true; }
  /// @throws NotSupported  rows came over the network and are saved instead.
  at::Tensor rows_again(const at::Tensor& x, const model::DispatchedTokens& routing,
                        std::int64_t experts_per_token) override;
  at::Tensor combine(const at::Tensor& y, const model::DispatchedTokens& routing,
                     const at::Tensor& weights) override;
  model::CombineGradients combine_backward(const at::Tensor& dout,
                                           const model::DispatchedTokens& routing,
                                           const at::Tensor& weights) override;
  model::Arrival<model::CombineGradients> begin_combine_backward(
      const at::Tensor& dout, const model::DispatchedTokens& routing,
      const at::Tensor& weights) override;
  model::DispatchGradients dispatch_backward(const at::Tensor& drows, const at::Tensor& dweights,
                                             const model::DispatchedTokens& routing,
                                             std::int64_t tokens,
                                             std::int64_t experts_per_token) override;

 private:
  /// What `DispatchedTokens::source` holds.
  struct Route {
    at::Tensor source;                    ///< int64 [T k]: (token, choice) of each row sent
    std::vector<std::int64_t> send_rows;  ///< [members]
    std::vector<std::int64_t> received;   ///< [members, local experts]
    [[nodiscard]] std::vector<std::int64_t> receive_rows() const;
    [[nodiscard]] std::size_t local_experts() const { return received.size() / send_rows.size(); }
  };
  [[nodiscard]] at::Tensor pack(const Route& route) const;
  [[nodiscard]] Route unpack(const model::DispatchedTokens& routing, std::int64_t pairs) const;
  [[nodiscard]] std::vector<std::int64_t> exchange_sizes(const std::vector<std::int64_t>& rows,
                                                         const ExpertMap& map,
                                                         const at::Tensor& like);
  [[nodiscard]] at::Tensor finish(comm::Work work) const;
  [[nodiscard]] at::Tensor by_expert(const at::Tensor& rows, const Route& route) const;
  [[nodiscard]] at::Tensor by_member(const at::Tensor& rows, const Route& route) const;

  comm::Communicator group_;
  const std::vector<ExpertMap>& maps_;
  std::size_t members_;
  SpanSink spans_;
};

}  // namespace meshloom::parallel
