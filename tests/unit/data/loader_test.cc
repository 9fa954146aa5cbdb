#include "meshloom/data/loader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/data/sources.h"

namespace meshloom::data {
namespace {

Document numbered(std::int64_t length, std::int32_t first) {
  Document document;
  for (std::int64_t i = 0; i < length; ++i) {
    document.tokens.push_back(first + static_cast<std::int32_t>(i));
  }
  return document;
}

// Lengths 1 .. 2 * mean, spread evenly by hash.
std::shared_ptr<Source> random_documents(std::int64_t count, std::int64_t mean, std::uint64_t seed,
                                         const std::string& name = "documents") {
  std::vector<Document> all;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto length = 1 + static_cast<std::int64_t>(random_bits(seed, i) % (2 * mean));
    all.push_back(numbered(length, static_cast<std::int32_t>(i * 1000)));
  }
  return documents(std::move(all), name);
}

LoaderOptions batch_of(std::int64_t tokens, std::int64_t longest = 0) {
  LoaderOptions options;
  options.global_batch_tokens = tokens;
  options.max_document_tokens = longest;
  options.seed = 7;
  return options;
}

TEST(Loader, PassHoldsEveryTokenOnce) {
  const auto source = random_documents(50, 100, 1);
  Loader loader({{source}}, batch_of(500, 64));
  std::map<std::int64_t, std::set<std::int64_t>> seen;
  std::int64_t missing = 0;
  for (std::int64_t i = 0; i < source->size(); ++i) {
    missing += static_cast<std::int64_t>(source->load(i).tokens.size());
  }
  while (missing > 0) {
    const StepMembership step = loader.next();
    EXPECT_LE(step.tokens(), 500);
    for (std::size_t i = 0; i < step.refs.size(); ++i) {
      const DocumentRef& ref = step.refs[i];
      EXPECT_EQ(step.samples[i].id, static_cast<std::int64_t>(i));
      EXPECT_EQ(step.samples[i].tokens, ref.end - ref.begin);
      EXPECT_EQ(step.samples[i].loss_tokens, ref.end - ref.begin - 1);
      EXPECT_LE(step.samples[i].tokens, 64);
      for (std::int64_t t = ref.begin; t < ref.end && missing > 0; ++t) {
        ASSERT_TRUE(seen[ref.document].insert(t).second) << "document " << ref.document;
        --missing;
      }
    }
  }
}

TEST(Loader, StepTakesWhatFitsAndAtLeastOne) {
  const auto source = documents({numbered(10, 0), numbered(10, 0), numbered(10, 0)});
  Loader fits({{source}}, batch_of(25));
  EXPECT_EQ(fits.next().tokens(), 20);
  EXPECT_EQ(fits.next().tokens(), 20);
  Loader too_small({{source}}, batch_of(4, 10));
  EXPECT_EQ(too_small.next().samples.size(), 1U);
  EXPECT_EQ(too_small.next().tokens(), 10);
}

TEST(Loader, LongDocumentIsCutAndCounted) {
  const auto source = documents({numbered(25, 0)});
  Loader loader({{source}}, batch_of(20, 10));
  const StepMembership first = loader.next();
  EXPECT_EQ(first.split_documents, 1);
  ASSERT_EQ(first.refs.size(), 2U);
  EXPECT_EQ(first.refs[1], (DocumentRef{0, 0, 10, 20}));
  EXPECT_EQ(loader.load(first.refs[1]).tokens, numbered(10, 10).tokens);
  const StepMembership second = loader.next();
  EXPECT_EQ(second.refs[0], (DocumentRef{0, 0, 20, 25}));
}

}  // namespace
}  // namespace meshloom::data
