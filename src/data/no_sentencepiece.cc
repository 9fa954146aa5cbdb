// Twin of sentencepiece.cc and sentencepiece_training.cc where the library is absent.
#include "meshloom/core/error.h"
#include "meshloom/data/tokenizer.h"

namespace meshloom::data {
namespace {

constexpr const char* kMissing =
    "this build has no SentencePiece (Debian, Ubuntu: libsentencepiece-dev)";

}  // namespace

std::shared_ptr<Tokenizer> load_sentencepiece(const std::string& path) {
  throw NotSupported("data.load_sentencepiece", path + ": " + kMissing);
}

void train_sentencepiece(const std::vector<std::string>&, const std::string& model_path,
                         const TokenizerTraining&) {
  throw NotSupported("data.train_sentencepiece", model_path + ": " + kMissing);
}

}  // namespace meshloom::data
