#pragma once

#include <cstdint>
#include <memory>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/data/loader.h"
#include "meshloom/data/tokenizer.h"
#include "meshloom/train/config.h"

namespace meshloom::train {

/// The loader that the `data` section describes: folders and text files as a document a file,
/// `.jsonl` files as a document a line. Without `data.tokenizer` a SentencePiece model is trained
/// on the corpus by rank 0, on first use, and kept in the cache folder, which all ranks must see.
/// Collective.
/// @param vocab_size  of the model; token ids are checked against it
/// @param tokenizer   used instead of what the config says; may be null
/// @throws Error  on all ranks alike: no paths, a path that is not there, an empty corpus, a
///   tokenizer file that does not load or has more tokens than the model.
[[nodiscard]] MESHLOOM_API std::shared_ptr<data::Loader> open_data(
    const TrainConfig& config, std::int64_t vocab_size, comm::Communicator world,
    std::shared_ptr<data::Tokenizer> tokenizer = nullptr);

}  // namespace meshloom::train
