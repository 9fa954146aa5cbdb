#include "meshloom/data/token_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/data/sources.h"
#include "temporary_folder.h"
#include "test_tokenizer.h"

namespace meshloom::data {
namespace {

using ::meshloom::data::testing::byte_tokenizer;
using ::meshloom::data::testing::TemporaryFolder;

std::vector<std::string> segments_of(const std::string& folder) {
  std::vector<std::string> paths;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    paths.push_back(entry.path().string());
  }
  return paths;
}

std::string bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

const Document kPlain{{1, 2, 3}, {}};
const Document kMasked{{4, 5}, {0, 1}};

TEST(TokenCache, WhatOneProcessAddsAnotherFinds) {
  const TemporaryFolder folder;
  TokenCache writer(folder.path("cache"));
  TokenCache reader(folder.path("cache"));
  EXPECT_EQ(reader.find("a"), std::nullopt);
  writer.add("a", kPlain);
  writer.add("b", kMasked);
  writer.add("none", {});
  EXPECT_EQ(reader.find("a"), kPlain);
  EXPECT_EQ(reader.find("b"), kMasked);
  EXPECT_EQ(reader.find("none"), Document{});
  EXPECT_EQ(writer.find("b"), kMasked);
  EXPECT_EQ(reader.find("c"), std::nullopt);
  EXPECT_EQ(reader.statistics().hits, 3);
  EXPECT_EQ(reader.statistics().misses, 2);
  EXPECT_EQ(TokenCache(folder.path("cache")).find("a"), kPlain);
}

TEST(TokenCache, TornRecordIsPassedOver) {
  const TemporaryFolder folder;
  {
    TokenCache writer(folder.path());
    writer.add("a", kPlain);
    writer.add("b", kMasked);
  }
  const std::string segment = segments_of(folder.path()).at(0);
  std::filesystem::resize_file(segment, std::filesystem::file_size(segment) - 1);
  TokenCache cache(folder.path());
  EXPECT_EQ(cache.find("a"), kPlain);
  EXPECT_EQ(cache.find("b"), std::nullopt);
  cache.add("b", kMasked);
  EXPECT_EQ(TokenCache(folder.path()).find("b"), kMasked);
}

TEST(TokenCache, AnyDamagedByteIsNoticed) {
  const TemporaryFolder folder;
  {
    TokenCache writer(folder.path());
    writer.add("a", kMasked);
  }
  const std::string segment = segments_of(folder.path()).at(0);
  const std::string good = bytes_of(segment);
  for (std::size_t i = 0; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 0x10);
    std::ofstream(segment, std::ios::binary) << bad;
    TokenCache cache(folder.path());
    EXPECT_EQ(cache.find("a"), std::nullopt) << "byte " << i;
    // A length that was changed may read as a torn record; everything else is counted.
    if (i < 40 || i >= 56) {
      EXPECT_EQ(cache.statistics().damaged, 1) << "byte " << i;
    }
  }
}

TEST(TokenCache, ConcurrentWritersAndReadersAgree) {
  const TemporaryFolder folder;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&folder, &wrong] {
      TokenCache cache(folder.path());
      for (std::int32_t i = 0; i < 100; ++i) {
        const Document expected{{i, i + 1, i + 2}, {}};
        const auto found = cache.find(std::to_string(i));
        if (found && *found != expected) ++wrong;
        if (!found) cache.add(std::to_string(i), expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  TokenCache cache(folder.path());
  for (std::int32_t i = 0; i < 100; ++i) EXPECT_TRUE(cache.find(std::to_string(i)).has_value());
}

TEST(TokenCache, FolderThatCannotBeIsRefused) {
  const TemporaryFolder folder;
  const std::string file = folder.write("file", "x");
  EXPECT_THROW(TokenCache cache(file), IoError);
}

TEST(TokenCache, DeletedFolderDoesNotFailARun) {
  const TemporaryFolder folder;
  TokenCache cache(folder.path("cache"));
  std::filesystem::remove_all(folder.path("cache"));
  cache.add("a", kPlain);
  EXPECT_EQ(cache.statistics().added, 0);
  EXPECT_NE(cache.statistics().write_error, "");
  EXPECT_EQ(cache.find("a"), std::nullopt);
}

TEST(CachedSource, TokenisesOnceAcrossRanksAndRuns) {
  const TemporaryFolder folder;
  const std::string path = folder.write("corpus/a.txt", "text");
  std::atomic<int> encoded{0};
  const auto counting = [&encoded](const std::string& fingerprint) {
    CallbackTokenizer callbacks;
    callbacks.encode = [&encoded](std::string_view text) {
      ++encoded;
      return std::vector<std::int32_t>(text.size(), 7);
    };
    callbacks.vocab_size = 8;
    callbacks.fingerprint = fingerprint;
    return callback_tokenizer(callbacks);
  };
  const auto open = [&](const std::string& fingerprint) {
    return cached(text_folder({folder.path("corpus")}, counting(fingerprint)),
                  std::make_shared<TokenCache>(folder.path("cache")));
  };
  const Document first = open("v1")->load(0);
  EXPECT_EQ(open("v1")->load(0), first);
  EXPECT_EQ(encoded, 1);
  (void)open("v2")->load(0);
  EXPECT_EQ(encoded, 2);
  folder.write("corpus/a.txt", "other text");
  EXPECT_EQ(open("v1")->load(0).tokens.size(), 10U);
  EXPECT_EQ(encoded, 3);
}

TEST(CachedSource, KeepsTheSourcesIdentity) {
  const TemporaryFolder folder;
  const auto plain = text_folder({folder.write("a.txt", "text")}, byte_tokenizer());
  const auto source = cached(plain, std::make_shared<TokenCache>(folder.path("cache")));
  EXPECT_EQ(source->fingerprint(), plain->fingerprint());
  EXPECT_EQ(source->order_key(0), plain->order_key(0));
  EXPECT_EQ(source->describe(0), plain->describe(0));
}

}  // namespace
}  // namespace meshloom::data
