#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/mesh/layout.h"
#include "meshloom/model/parameters.h"
#include "meshloom/model/tensor_block.h"
#include "meshloom/parallel/sharded_space.h"

namespace meshloom::train {

using model::blocks_of_range;
using model::TensorBlock;

/// A state that has one value a parameter element, e.g. "master" or "exp_avg": what this rank holds
/// of it.
struct ShardState {
  std::string name;
  at::Tensor values;  ///< [range.size()], contiguous
};

/// What one rank holds of one set of parameters.
struct CheckpointPart {
  const model::ParameterTable& table;  ///< of this part alone, under the model's names
  parallel::FlatRange range;           ///< in the part's flat space
  std::vector<ShardState> states;
};

/// Everything of a checkpoint but its tensors.
struct CheckpointInfo {
  std::int64_t step = 0;                     ///< steps completed
  Layout layout;                             ///< of the ranks that wrote it
  std::map<std::string, std::string> texts;  ///< data position, config, ...
  std::map<std::string, double> numbers;     ///< cost coefficients, counters, ...
};

/// Folders `<root>/step-N` that carry a manifest, newest first. Damaged ones are listed too.
[[nodiscard]] MESHLOOM_API std::vector<std::string> list_checkpoints(const std::string& root);

/// The folder of a step's checkpoint in its root.
[[nodiscard]] MESHLOOM_API std::string checkpoint_name(std::int64_t step);

/// Writes `<root>/step-N` (docs/train.md has the format): each rank its own file under a temporary
/// folder, synced to disk; then rank 0 writes the manifest and renames the folder. Older
/// checkpoints beyond `keep` (0: none) are removed at the very end. `root` is one folder that all
/// ranks see. Collective.
/// @param parts  what this rank holds; the parts of all ranks cover every parameter once
/// @throws IoError  on all ranks alike, naming rank and file; earlier checkpoints are untouched
///   and nothing of this one is left, the group stays usable.
MESHLOOM_API void write_checkpoint(const std::string& root, const CheckpointInfo& info,
                                   const std::vector<CheckpointPart>& parts, int keep,
                                   comm::Communicator group);
/// The same where all parameters are one part. @param range  of this rank
MESHLOOM_API void write_checkpoint(const std::string& root, const CheckpointInfo& info,
                                   const model::ParameterTable& table, parallel::FlatRange range,
                                   const std::vector<ShardState>& states, int keep,
                                   comm::Communicator group);

/// Reads one checkpoint folder, written by any number of ranks.
class MESHLOOM_API CheckpointReader {
 public:
  /// Reads the manifest and checks that every file is there with its full size.
  /// @throws IoError    the folder cannot be read.
  /// @throws DataError  another format, or damage; names the file.
  explicit CheckpointReader(const std::string& folder);
  ~CheckpointReader();
  CheckpointReader(CheckpointReader&&) noexcept;
  CheckpointReader& operator=(CheckpointReader&&) noexcept;

  [[nodiscard]] const CheckpointInfo& info() const;

  /// Fills the elements of `range`, reading only the slices that overlap it; their checksums are
  /// verified. Not collective.
  /// @param values  [range.size()], contiguous, any float dtype and device
  /// @throws DataError  a checksum differs, a slice is missing or a shape is another; names file
  ///   and tensor. `values` is partly written.
  void read(const model::ParameterTable& table, parallel::FlatRange range, const std::string& state,
            at::Tensor& values) const;

  /// Verifies every slice's checksum. @throws DataError  the first that differs.
  void verify() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// Writes the model of a checkpoint, written under any layout, as a folder that transformers opens:
/// the masters in `dtype`, one tensor in memory at a time. Not collective.
/// @param dtype   float32, bfloat16 or float64
/// @param folder  made if it is not there; see model::save_pretrained for what a failure leaves
/// @throws IoError, DataError  the checkpoint cannot be read or is damaged; names the file.
MESHLOOM_API void export_checkpoint(const std::string& checkpoint, const std::string& folder,
                                    const std::string& dtype = "float32");

}  // namespace meshloom::train
