#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/model/parameters.h"
#include "meshloom/parallel/sharded_space.h"
#include "meshloom/train/config.h"

namespace meshloom::train {

/// How one parameter is optimised.
struct ParameterSetting {
  std::string name;
  double lr_factor = 1.0;
  double weight_decay = 0.0;
  bool frozen = false;
  friend bool operator==(const ParameterSetting&, const ParameterSetting&) = default;
};

/// Settings of every parameter of the table, in its order: decay by the table's default (none on
/// norms, biases and embeddings), then the first matching rule.
/// @throws InvalidArgument  a rule matches no parameter; names it.
[[nodiscard]] MESHLOOM_API std::vector<ParameterSetting> parameter_settings(
    const model::ParameterTable& table, const AdamWOptions& options,
    const std::vector<ParameterRule>& rules);

/// Balances experts without a loss (arXiv 2408.15664): every correction bias in the range moves by
/// `speed`, up where its expert was chosen less often than the mean, down where more often. Element
/// by element, so any sharding gives the same update. Those that `settings` freeze stay.
/// @param master  [range.size()] @param counts  [range.size()]: the summed gradient, whose elements
///   of a correction bias are its expert's choices in the step @param mean  choices per expert
MESHLOOM_API void move_correction_biases_(at::Tensor& master, const at::Tensor& counts,
                                          const model::ParameterTable& table,
                                          parallel::FlatRange range,
                                          const std::vector<ParameterSetting>& settings,
                                          double mean, double speed);

/// AdamW on one rank's range of the flat parameter space. Element-wise, so any sharding gives the
/// same update (to rounding of the vectorised kernel). Moments start at zero, in the master's
/// dtype. Correction biases are not its to move: gradients do not reach them.
/// Not collective; not thread safe.
class MESHLOOM_API AdamW {
 public:
  /// @param range   own part of the flat space
  /// @param master  [range.size()], fp32 or fp64; updated in place by `step`
  AdamW(const model::ParameterTable& table, parallel::FlatRange range, at::Tensor master,
        const AdamWOptions& options, const std::vector<ParameterRule>& rules);
  /// @param settings  by name, of every parameter of the table at least: of the whole model where
  ///   `table` is a part of it
  /// @throws InvalidArgument  a parameter of the table has no setting.
  AdamW(const model::ParameterTable& table, const std::vector<ParameterSetting>& settings,
        parallel::FlatRange range, at::Tensor master, const AdamWOptions& options);

  /// The same elements under other names: the range's settings follow. @throws InvalidArgument  a
  /// parameter of the table has no setting.
  void settle(const model::ParameterTable& table, const std::vector<ParameterSetting>& settings);

  /// Sum of squares over the trained elements of `gradient`, accumulated in fp64 in a fixed order.
  /// @param gradient  [range.size()]
  [[nodiscard]] double squared_norm(const at::Tensor& gradient) const;

  /// One update with learning rate options.lr * factor * the parameter's own factor.
  /// @param gradient  [range.size()], dtype of the master; multiplied by `scale` in place
  void step(at::Tensor& gradient, double factor, double scale = 1.0);

  [[nodiscard]] const at::Tensor& exp_avg() const { return exp_avg_; }
  [[nodiscard]] const at::Tensor& exp_avg_sq() const { return exp_avg_sq_; }
  /// Updates so far: what bias correction counts.
  [[nodiscard]] std::int64_t updates() const { return updates_; }
  void set_updates(std::int64_t updates) { updates_ = updates; }

 private:
  /// Neighbouring elements with equal settings, relative to the range.
  struct Segment {
    std::int64_t begin = 0;
    std::int64_t end = 0;
  };
  struct Group {
    double lr_factor = 1.0;
    double weight_decay = 0.0;
    std::vector<Segment> segments;
  };

  AdamWOptions options_;
  parallel::FlatRange range_;
  at::Tensor master_;
  at::Tensor exp_avg_;
  at::Tensor exp_avg_sq_;
  std::vector<Group> groups_;
  std::int64_t updates_ = 0;
};

}  // namespace meshloom::train
