#include <fmt/format.h>

#include <cstring>

#include "meshloom/core/error.h"
#include "meshloom/data/loader.h"

namespace meshloom::data {
namespace {

constexpr std::int64_t kMembershipMagic = 0x314D45544C4D;  // "MLTEM1", host byte order
constexpr std::size_t kHeaderWords = 6;
constexpr std::size_t kSampleWords = 5;

}  // namespace

std::int64_t StepMembership::tokens() const {
  std::int64_t total = 0;
  for (const plan::SampleInfo& sample : samples) total += sample.tokens;
  return total;
}

std::string StepMembership::to_bytes() const {
  std::vector<std::int64_t> words{kMembershipMagic,
                                  step,
                                  epoch,
                                  split_documents,
                                  skipped_documents,
                                  static_cast<std::int64_t>(samples.size())};
  for (std::size_t i = 0; i < samples.size(); ++i) {
    const DocumentRef& ref = refs[i];
    words.insert(words.end(),
                 {ref.source, ref.document, ref.begin, ref.end, samples[i].loss_tokens});
  }
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(std::int64_t)};
}

StepMembership StepMembership::from_bytes(const std::string& bytes) {
  const char* where = "data.membership";
  if (bytes.size() % sizeof(std::int64_t) != 0 ||
      bytes.size() < kHeaderWords * sizeof(std::int64_t)) {
    throw DataError(where, fmt::format("{} bytes are no step membership", bytes.size()));
  }
  std::vector<std::int64_t> words(bytes.size() / sizeof(std::int64_t));
  std::memcpy(words.data(), bytes.data(), bytes.size());
  const std::int64_t body = static_cast<std::int64_t>(words.size() - kHeaderWords);
  if (words[0] != kMembershipMagic || words[5] < 0 || body % kSampleWords != 0 ||
      words[5] != body / static_cast<std::int64_t>(kSampleWords)) {
    throw DataError(where, fmt::format("{} bytes with a header that is not one of {} samples",
                                       bytes.size(), body / kSampleWords));
  }
  StepMembership result;
  result.step = words[1];
  result.epoch = words[2];
  result.split_documents = words[3];
  result.skipped_documents = words[4];
  for (std::int64_t i = 0; i < words[5]; ++i) {
    const std::int64_t* word = words.data() + kHeaderWords + i * kSampleWords;
    const DocumentRef ref{word[0], word[1], word[2], word[3]};
    if (ref.source < 0 || ref.document < 0 || ref.begin < 0 || ref.end <= ref.begin ||
        word[4] < 0 || word[4] > ref.end - ref.begin) {
      throw DataError(where, fmt::format("sample {}: source {}, document {}, tokens [{}, {}), {} "
                                         "loss tokens",
                                         i, ref.source, ref.document, ref.begin, ref.end, word[4]));
    }
    result.refs.push_back(ref);
    result.samples.push_back({i, ref.end - ref.begin, word[4]});
  }
  return result;
}

}  // namespace meshloom::data
