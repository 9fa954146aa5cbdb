#include "meshloom/data/loader.h"

#include <gmock/gmock.h>
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
#include "temporary_folder.h"

namespace meshloom::data {
namespace {

using ::meshloom::data::testing::message_of;
using ::testing::HasSubstr;

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

TEST(Loader, PieceOfAMaskCountsItsOwnTargets) {
  const auto source = documents({{{1, 2, 3, 4, 5}, {1, 1, 1, 0, 1}}});
  Loader loader({{source}}, batch_of(8, 3));
  const StepMembership step = loader.next();
  EXPECT_EQ(step.samples[0].loss_tokens, 2);
  EXPECT_EQ(step.samples[1].loss_tokens, 1);
  EXPECT_EQ(loader.load(step.refs[1]), (Document{{4, 5}, {0, 1}}));
}

TEST(Loader, OneTokenDocumentHasNoTarget) {
  Loader loader({{documents({{{5}, {}}})}}, batch_of(1));
  EXPECT_EQ(loader.next().samples[0], (plan::SampleInfo{0, 1, 0}));
}

TEST(Loader, MembershipDependsOnOptionsAndSourcesAlone) {
  const auto source = random_documents(40, 50, 3);
  LoaderOptions eager = batch_of(300, 64);
  eager.prefetch_steps = 9;
  LoaderOptions frugal = batch_of(300, 64);
  frugal.prefetch_steps = 1;
  frugal.memory_bytes = 0;
  const auto slow = callback_source("slow", source->size(), [&source](std::int64_t i) {
    if (i % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return source->load(i);
  });
  Loader a({{source}}, eager);
  Loader b({{slow}}, frugal);
  for (int i = 0; i < 25; ++i) {
    const StepMembership step = a.next();
    EXPECT_EQ(step, b.next());
    EXPECT_EQ(step.step, i);
    for (const DocumentRef& ref : step.refs) EXPECT_EQ(a.load(ref), b.load(ref));
  }
  LoaderOptions other = eager;
  other.seed = 8;
  Loader c({{source}}, eager);
  Loader d({{source}}, other);
  EXPECT_NE(c.next(), d.next());
  EXPECT_NE(c.fingerprint(), d.fingerprint());
}

TEST(Loader, PassesAreShuffledDifferently) {
  const auto source = random_documents(30, 1, 4);  // lengths 1 and 2
  Loader loader({{source}}, batch_of(1, 2));
  std::vector<std::int64_t> order;
  for (int i = 0; i < 60; ++i) {
    const StepMembership step = loader.next();
    EXPECT_EQ(step.epoch, (i + 1) / 30);
    order.push_back(step.refs[0].document);
  }
  const std::vector<std::int64_t> first(order.begin(), order.begin() + 30);
  const std::vector<std::int64_t> second(order.begin() + 30, order.end());
  EXPECT_NE(first, second);
  EXPECT_TRUE(std::is_permutation(first.begin(), first.end(), second.begin()));
}

TEST(Loader, RestoreContinuesWithTheSameSteps) {
  const std::vector<WeightedSource> sources{{random_documents(20, 60, 5), 1.0},
                                            {random_documents(9, 400, 6), 2.5}};
  LoaderOptions options = batch_of(200, 90);
  options.held_out_fraction = 0.2;
  Loader straight(sources, options);
  for (int stop = 0; stop < 40; ++stop) {
    Loader resumed(sources, options);
    (void)resumed.next();  // restore also works on a loader that has begun
    resumed.restore(straight.state());
    const std::string before = straight.state();
    const StepMembership step = straight.next();
    ASSERT_EQ(resumed.next(), step) << "step " << stop;
    ASSERT_EQ(resumed.state(), straight.state());
    ASSERT_NE(before, straight.state());
  }
}

TEST(Loader, StateOfOtherOptionsOrSourcesIsRefusedByName) {
  const auto source = random_documents(20, 60, 5);
  Loader loader({{source}}, batch_of(200));
  const StepMembership first = loader.next();
  const std::string state = loader.state();
  LoaderOptions other = batch_of(200);
  other.seed = 8;
  EXPECT_THAT(message_of<DataError>([&] { Loader({{source}}, other).restore(state); }),
              HasSubstr("written with seed 7, this loader has 8"));
  EXPECT_THAT(message_of<DataError>([&] {
                Loader({{random_documents(21, 60, 5, "grown")}}, batch_of(200)).restore(state);
              }),
              HasSubstr("20 documents of \"documents\" then, 21 of \"grown\" now"));
  for (const std::string bad : {"", "{}", "[]", "{\"version\": 9}"}) {
    EXPECT_THROW(loader.restore(bad), DataError) << bad;
  }
  std::string outside = state;
  const std::string next = "\"next\":";
  outside.replace(outside.find(next), next.size(), next + "9");
  EXPECT_THAT(message_of<DataError>([&] { loader.restore(outside); }), HasSubstr("outside"));
  Loader fresh({{source}}, batch_of(200));
  (void)fresh.next();
  EXPECT_EQ(loader.next(), fresh.next()) << "a refused state changed the loader";
}

TEST(Loader, SourcesMixByTokenWeight) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    const double weight = 0.25 * static_cast<double>(1 + seed * seed);
    const std::vector<WeightedSource> sources{{random_documents(30, 40, seed), 1.0},
                                              {random_documents(70, 15, seed + 9), weight},
                                              {random_documents(5, 200, seed + 99), 0.5}};
    Loader loader(sources, batch_of(1000, 500));
    std::vector<double> given(3, 0.0);
    double total = 0.0;
    for (int i = 0; i < 60; ++i) {
      const StepMembership step = loader.next();
      for (std::size_t s = 0; s < step.refs.size(); ++s) {
        given[static_cast<std::size_t>(step.refs[s].source)] +=
            static_cast<double>(step.samples[s].tokens);
        total += static_cast<double>(step.samples[s].tokens);
      }
    }
    // Each source is at most one document (400 tokens here) ahead of its share.
    constexpr double kLongestDocument = 400.0;
    for (std::size_t s = 0; s < 3; ++s) {
      const double share = sources[s].weight / (1.5 + weight);
      EXPECT_NEAR(given[s], share * total, 3 * kLongestDocument) << "seed " << seed;
    }
  }
}

TEST(Loader, HeldOutDocumentsAreNeverTrainedOn) {
  const auto source = random_documents(200, 10, 11);
  LoaderOptions options = batch_of(500);
  options.held_out_fraction = 0.1;
  Loader loader({{source}}, options);
  const StepMembership held = loader.held_out(1'000'000);
  EXPECT_GT(held.refs.size(), 8U);
  EXPECT_LT(held.refs.size(), 40U);
  EXPECT_EQ(loader.held_out(1'000'000), held);
  EXPECT_LE(loader.held_out(50).tokens(), 50);
  EXPECT_EQ(loader.held_out(0).refs.size(), 1U);
  std::set<std::int64_t> hidden;
  for (const DocumentRef& ref : held.refs) hidden.insert(ref.document);
  std::set<std::int64_t> seen;
  StepMembership step = loader.next();
  for (; step.epoch < 2; step = loader.next()) {
    for (const DocumentRef& ref : step.refs) {
      EXPECT_FALSE(hidden.contains(ref.document));
      seen.insert(ref.document);
    }
  }
  EXPECT_EQ(seen.size() + hidden.size(), 200U);
  options.seed = 99;
  EXPECT_EQ(Loader({{source}}, options).held_out(1'000'000), held) << "another seed leaks";
}

TEST(Loader, SmallCorpusStillHoldsOneOut) {
  LoaderOptions options = batch_of(10);
  options.held_out_fraction = 1e-9;
  Loader two({{documents({numbered(3, 0), numbered(3, 9)})}}, options);
  EXPECT_EQ(two.held_out(100).refs.size(), 1U);
  Loader one({{documents({numbered(3, 0)})}}, options);
  EXPECT_TRUE(one.held_out(100).refs.empty());
  options.held_out_fraction = 0.999999;
  EXPECT_THAT(message_of<DataError>([&] {
                Loader all({{documents({numbered(3, 0), numbered(3, 9)}, "tiny")}}, options);
              }),
              HasSubstr("tiny: held_out_fraction"));
}

TEST(Loader, EmptyDocumentsAreSkippedAndCounted) {
  Loader loader({{documents({{}, numbered(4, 0), {}})}}, batch_of(4));
  EXPECT_EQ(loader.next().tokens(), 4);
  EXPECT_EQ(loader.next().tokens(), 4);
  const StepMembership third = loader.next();
  EXPECT_GE(third.skipped_documents, 4);
  EXPECT_LE(third.skipped_documents, 6);
}

TEST(Loader, NothingToTrainOnIsRefusedByName) {
  EXPECT_THAT(message_of<DataError>([] { Loader l({{documents({}, "void")}}, batch_of(4)); }),
              HasSubstr("void has no documents"));
  Loader loader({{documents({{}, {}}, "hollow")}}, batch_of(4));
  EXPECT_THAT(message_of<DataError>([&] { (void)loader.next(); }),
              HasSubstr("hollow: none of its 2 documents holds any tokens"));
  EXPECT_THROW((void)loader.next(), DataError) << "the failure stays";
}

TEST(Loader, OptionsAreChecked) {
  const auto source = documents({numbered(3, 0)});
  const auto refused = [&source](auto change, double weight = 1.0) {
    LoaderOptions options = batch_of(4);
    change(options);
    return message_of<InvalidArgument>([&] { Loader loader({{source, weight}}, options); });
  };
  EXPECT_THAT(refused([](auto& o) { o.global_batch_tokens = 0; }), HasSubstr("global_batch"));
  EXPECT_THAT(refused([](auto& o) { o.max_document_tokens = -1; }), HasSubstr("max_document"));
  EXPECT_THAT(refused([](auto& o) { o.held_out_fraction = 1.0; }), HasSubstr("held_out"));
  EXPECT_THAT(refused([](auto& o) { o.prefetch_steps = 0; }), HasSubstr("prefetch"));
  EXPECT_THAT(refused([](auto&) {}, 0.0), HasSubstr("weight of documents is 0"));
  EXPECT_THROW(Loader({}, batch_of(4)), InvalidArgument);
}

TEST(Loader, BadTokensAreRefusedByDocumentAndPlace) {
  LoaderOptions options = batch_of(4);
  options.vocab_size = 100;
  Loader loader({{documents({{{5, 100}, {}}}, "mine")}}, options);
  EXPECT_THAT(message_of<DataError>([&] { (void)loader.next(); }),
              HasSubstr("mine[0]: token 1 is 100, expected 0 .. 99"));
}

TEST(Loader, FailureOfAUsersSourceNamesTheDocumentAfterTheGoodSteps) {
  const auto source = callback_source("mine", 10, [](std::int64_t i) -> Document {
    if (i == 4) throw std::runtime_error("disk on fire");
    return {{1, 2}, {}};
  });
  Loader loader({{source}}, batch_of(2));
  int good = 0;
  const std::string message = message_of<DataError>([&] {
    while (true) {
      (void)loader.next();
      ++good;
    }
  });
  EXPECT_LT(good, 10);
  EXPECT_THAT(message, HasSubstr("mine[4]: disk on fire"));
}

TEST(Loader, SlowSourceTimesOutByNameAndCanBeAwaited) {
  std::atomic<bool> open{false};
  const auto source = callback_source("gate", 1, [&open](std::int64_t) -> Document {
    open.wait(false);
    return {{1, 2}, {}};
  });
  LoaderOptions options = batch_of(2);
  options.timeout = std::chrono::milliseconds(20);
  Loader loader({{source}}, options);
  EXPECT_THAT(message_of<Timeout>([&] { (void)loader.next(); }), HasSubstr("gate[0]"));
  open = true;
  open.notify_all();
  options.timeout = std::chrono::seconds(60);
  StepMembership step;
  for (bool done = false; !done;) {
    try {
      step = loader.next();
      done = true;
    } catch (const Timeout&) {
    }
  }
  EXPECT_EQ(step.tokens(), 2);
}

TEST(Loader, EndsCleanlyWhileTokenisingAhead) {
  for (int i = 0; i < 20; ++i) {
    LoaderOptions options = batch_of(50);
    options.prefetch_steps = 50;
    Loader loader({{random_documents(100, 5, 1)}}, options);
    if (i % 2 == 0) (void)loader.next();
  }
}

TEST(Loader, LoadRefusesWhatIsNotThere) {
  Loader loader({{documents({numbered(3, 0)}, "mine")}}, batch_of(4));
  EXPECT_THROW((void)loader.load({1, 0, 0, 1}), DataError);
  EXPECT_THROW((void)loader.load({0, 1, 0, 1}), DataError);
  EXPECT_THAT(message_of<DataError>([&] {
                (void)loader.load({0, 0, 0, 4});
              }),
              HasSubstr("mine[0] has 3 tokens now, [0, 4) were asked for"));
  EXPECT_EQ(loader.describe({0, 0, 1, 2}), "mine[0] tokens [1, 2)");
}

TEST(StepMembership, BytesComeBackOrAreRefused) {
  Loader loader({{random_documents(20, 60, 5)}}, batch_of(200, 50));
  const StepMembership step = loader.next();
  const std::string bytes = step.to_bytes();
  EXPECT_EQ(StepMembership::from_bytes(bytes), step);
  EXPECT_THROW((void)StepMembership::from_bytes(""), DataError);
  EXPECT_THROW((void)StepMembership::from_bytes(bytes + std::string(8, '\0')), DataError);
  EXPECT_THROW((void)StepMembership::from_bytes(bytes.substr(0, bytes.size() - 8)), DataError);
  std::string damaged = bytes;
  damaged[damaged.size() - 1] = '\x7F';  // the last sample's loss tokens
  EXPECT_THROW((void)StepMembership::from_bytes(damaged), DataError);
}

}  // namespace
}  // namespace meshloom::data
