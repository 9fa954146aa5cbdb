#include "meshloom/model/safetensors.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "file_limit.h"
#include "files.h"
#include "meshloom/core/error.h"

namespace meshloom::model {
namespace {

using Json = nlohmann::json;

std::string little_endian(std::uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>((value >> (8 * i)) & 0xFF));
  return bytes;
}

/// A file of this header text and this many data bytes, the length as it should be.
std::string with_header(const std::string& header, std::size_t data_bytes) {
  return little_endian(header.size()) + header + std::string(data_bytes, 'x');
}

Json entry(const char* dtype, Json shape, Json begin, Json end) {
  return {{"dtype", dtype}, {"shape", std::move(shape)}, {"data_offsets", {begin, end}}};
}

template <class Failure>
std::string open_message(const std::string& bytes, std::string* path = nullptr) {
  const TemporaryFolder folder;
  const std::string file = folder.file("x.safetensors");
  write_bytes(file, bytes);
  if (path != nullptr) *path = file;
  return message_of<Failure>([&] { const SafetensorsFile opened(file); });
}

struct Hostile {
  const char* what;
  std::string bytes;
  std::vector<std::string> expected;  ///< in the message, beside the file
};

TEST(SafetensorsFile, MalformedFilesEndInAnErrorThatNamesFileAndTensor) {
  const auto one = [](const char* name, const Json& e, std::size_t data_bytes) {
    return with_header(Json{{name, e}}.dump(), data_bytes);
  };
  const auto two = [](const Json& a, const Json& b, std::size_t data_bytes) {
    return with_header(Json{{"a", a}, {"b", b}}.dump(), data_bytes);
  };
  const std::string good = one("w", entry("F32", {2, 3}, 0, 24), 24);
  const std::uint64_t huge = std::uint64_t{1} << 62;
  std::string deep;
  for (int i = 0; i < 100'000; ++i) deep += "{\"a\":";
  const std::vector<Hostile> cases{
      {"empty", "", {"0 bytes are too few"}},
      {"seven bytes", "1234567", {"7 bytes are too few"}},
      {"truncated in the header", good.substr(0, 20), {"truncated"}},
      {"truncated in the data", good.substr(0, good.size() - 1), {"\"w\"", "outside the 23 bytes"}},
      {"data too long", good + "y", {"tensors take 24 bytes, the file holds 25"}},
      {"header length of all ones", std::string(8, '\xff') + good.substr(8), {"truncated"}},
      {"header length of 2^63", little_endian(std::uint64_t{1} << 63) + good.substr(8), {"header"}},
      {"header longer than the file", little_endian(good.size()) + good.substr(8), {"truncated"}},
      {"no JSON", with_header("hello", 0), {"not a JSON object"}},
      {"JSON, but no object", with_header("[1]", 0), {"not a JSON object"}},
      {"not UTF-8", with_header("{\"w\xff\xfe\": 1}", 0), {"not a JSON object"}},
      {"nested deeply", with_header(deep, 0), {"nests too deeply"}},
      {"arrays nested deeply", with_header(std::string(100'000, '['), 0), {"header"}},
      {"name twice",
       with_header(R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                   R"("w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                   2),
       {"\"w\" is there twice"}},
      {"field twice",
       with_header(R"({"w":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}})", 1),
       {"\"dtype\" is there twice"}},
      {"entry is a number", with_header(R"({"w": 1})", 0), {"\"w\"", "expected dtype, shape"}},
      {"no dtype", with_header(R"({"w": {"shape": [1], "data_offsets": [0, 1]}})", 1), {"\"w\""}},
      {"one offset",
       with_header(R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1),
       {"\"w\"", "two data_offsets"}},
      {"negative extent", one("w", entry("U8", {-1}, 0, 1), 1), {"\"w\"", "-1 is no size"}},
      {"fractional extent", one("w", entry("U8", {1.5}, 0, 1), 1), {"\"w\"", "1.5 is no size"}},
      {"extent as text", one("w", entry("U8", {"1"}, 0, 1), 1), {"\"w\"", "is no size"}},
      {"negative offset", one("w", entry("U8", {1}, -1, 0), 1), {"\"w\"", "-1 is no size"}},
      {"offsets the wrong way", one("w", entry("U8", {1}, 1, 0), 1), {"\"w\"", "[1, 0]"}},
      {"offsets beyond the file", one("w", entry("U8", {8}, 0, 8), 4), {"\"w\"", "outside"}},
      {"offset of 2^62", one("w", entry("U8", {huge}, 0, huge), 4), {"\"w\"", "outside"}},
      {"offset above 2^63",
       one("w", entry("U8", {1}, 0, std::uint64_t{1} << 63), 1),
       {"\"w\"", "is no size"}},
      {"shape needs more", one("w", entry("F32", {2, 4}, 0, 24), 24), {"\"w\"", "need 32"}},
      {"shape needs less", one("w", entry("F16", {2, 3}, 0, 24), 24), {"\"w\"", "need 12"}},
      {"shape overflows", one("w", entry("F32", {huge, huge}, 0, 24), 24), {"\"w\"", "overflows"}},
      {"shape overflows to nothing",
       one("w", entry("F64", {huge}, 0, 0), 0),
       {"\"w\"", "overflows"}},
      {"empty, other extents overflow",
       one("w", entry("U8", {0, huge, huge}, 0, 0), 0),
       {"\"w\"", "overflows"}},
      {"overlap", two(entry("U8", {4}, 0, 4), entry("U8", {4}, 2, 6), 6), {"\"b\"", "overlap"}},
      {"same bytes", two(entry("U8", {4}, 0, 4), entry("U8", {4}, 0, 4), 4), {"\"b\"", "overlap"}},
      {"gap", two(entry("U8", {4}, 0, 4), entry("U8", {4}, 6, 10), 10), {"\"b\"", "gap"}},
      {"gap in front", one("w", entry("U8", {4}, 2, 6), 6), {"\"w\"", "gap"}},
      {"metadata no object", with_header(R"({"__metadata__": "pt"})", 0), {"__metadata__"}},
      {"metadata no text", with_header(R"({"__metadata__": {"a": 1}})", 0), {"__metadata__.a"}},
  };
  for (const Hostile& c : cases) {
    std::string path;
    const std::string message = open_message<DataError>(c.bytes, &path);
    EXPECT_NE(message.find(path), std::string::npos) << c.what << ": " << message;
    for (const std::string& part : c.expected) {
      EXPECT_NE(message.find(part), std::string::npos)
          << c.what << ": no \"" << part << "\" in: " << message;
    }
  }
  EXPECT_EQ(open_message<Error>(good), "") << "the file that the cases spoil is good itself";
}

TEST(SafetensorsFile, EveryTruncationAndEveryFlippedHeaderBitIsHandled) {
  const std::string good = with_header(
      Json{{"a", entry("F32", {2, 3}, 0, 24)}, {"b", entry("BF16", {3}, 24, 30)}}.dump(), 30);
  const TemporaryFolder folder;
  const std::string path = folder.file("x.safetensors");
  for (std::size_t bytes = 0; bytes < good.size(); ++bytes) {
    write_bytes(path, good.substr(0, bytes));
    EXPECT_THROW(const SafetensorsFile opened(path), DataError) << bytes;
  }
  const std::size_t header_end = good.size() - 30;
  for (std::size_t bit = 0; bit < header_end * 8; ++bit) {
    std::string spoilt = good;
    spoilt[bit / 8] = static_cast<char>(spoilt[bit / 8] ^ (1 << (bit % 8)));
    write_bytes(path, spoilt);
    try {  // another name or dtype of the same width is as good a file; all else is refused
      for (const auto& [name, tensor] : load_safetensors(path)) (void)tensor.sum();
    } catch (const Error&) {
    }
  }
}

TEST(SafetensorsFile, UnknownDtypesAreRefusedByName) {
  const std::string message =
      open_message<NotSupported>(with_header(Json{{"w", entry("F4", {2}, 0, 1)}}.dump(), 1));
  EXPECT_NE(message.find("\"w\": dtype \"F4\" is not built"), std::string::npos) << message;
}

TEST(SafetensorsFile, WhatCannotBeReadIsAnIoErrorThatNamesIt) {
  const TemporaryFolder folder;
  for (const std::string& path : {folder.file("absent"), folder.path(), std::string("/dev/null")}) {
    const std::string message = message_of<IoError>([&] { const SafetensorsFile opened(path); });
    EXPECT_NE(message.find(path), std::string::npos) << message;
  }
}

TEST(SafetensorsFile, UnalignedTensorsAreCopiedAndKeepTheirValues) {
  // A header whose length is no multiple of 4, as other writers make them.
  std::string header = Json{{"w", entry("F32", {2}, 0, 8)}}.dump();
  while (header.size() % 4 != 1) header += ' ';
  const float values[] = {1.5F, -2.0F};
  std::string bytes = with_header(header, 0);
  bytes.append(reinterpret_cast<const char*>(values), sizeof values);
  const TemporaryFolder folder;
  write_bytes(folder.file("x"), bytes);
  const at::Tensor w = SafetensorsFile(folder.file("x")).tensor("w");
  EXPECT_EQ(w[0].item<float>(), 1.5F);
  EXPECT_EQ(w[1].item<float>(), -2.0F);
}

NamedTensors assorted_tensors() {
  NamedTensors tensors;
  for (const auto type : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                          at::kShort, at::kChar, at::kByte}) {
    tensors.emplace_back(std::string("t.") + c10::toString(type),
                         at::arange(15, at::TensorOptions().dtype(type)).view({3, 5}));
  }
  tensors.emplace_back("flags", at::ones({3}, at::kBool));
  tensors.emplace_back("scalar", at::full({}, 2.5, at::kDouble));
  tensors.emplace_back("nothing", at::empty({0, 7}, at::kFloat));
  tensors.emplace_back("strided", at::arange(12, at::kFloat).view({3, 4}).t());
  tensors.emplace_back("näme \"with\" \\ 字", at::ones({1}, at::kFloat));
  return tensors;
}

TEST(SafetensorsWriter, WhatIsWrittenReadsBackTheSame) {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.safetensors");
  const NamedTensors tensors = assorted_tensors();
  save_safetensors(path, tensors, {{"format", "pt"}, {"note", "näher"}});
  const SafetensorsFile file(path);
  EXPECT_EQ(file.tensors().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor back = file.tensor(name);
    EXPECT_EQ(back.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(back, tensor)) << name;
  }
  EXPECT_EQ(file.metadata().at("note"), "näher");
  EXPECT_EQ(file.find_if("absent"), nullptr);
  EXPECT_NE(message_of<InvalidArgument>([&] { (void)file.tensor("absent"); }).find("absent"),
            std::string::npos);
}

TEST(SafetensorsWriter, ReadTensorsOutliveTheFileObjectAndItsName) {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.safetensors");
  save_safetensors(path, {{"w", at::arange(4, at::kFloat)}});
  at::Tensor w = SafetensorsFile(path).tensor("w");
  std::filesystem::remove(path);
  w.add_(1);  // private to this process
  EXPECT_EQ(w.sum().item<float>(), 10.0F);
}

TEST(SafetensorsWriter, MisuseIsRefusedAndLeavesNothing) {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.safetensors");
  const TensorInfo info{.name = "w", .dtype = at::kFloat, .shape = {2}};
  EXPECT_THROW(SafetensorsWriter(path, {info, info}, {}), InvalidArgument);
  const TensorInfo wide{.name = "c", .dtype = at::kComplexFloat, .shape = {2}};
  EXPECT_THROW(SafetensorsWriter(path, {wide}, {}), NotSupported);
  {
    SafetensorsWriter writer(path, {info}, {});
    EXPECT_THROW(writer.commit(), InvalidArgument);
    const std::string message =
        message_of<InvalidArgument>([&] { writer.write(at::ones({3}, at::kFloat)); });
    EXPECT_NE(message.find("\"w\""), std::string::npos) << message;
    writer.write(at::ones({2}, at::kFloat));
    EXPECT_THROW(writer.write(at::ones({2}, at::kFloat)), InvalidArgument);
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  EXPECT_THROW(save_safetensors(folder.file("no/such/folder"), {}), IoError);
}

TEST(SafetensorsWriter, FullDiskNamesTheFileAndLeavesTheFormerOneWhole) {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.safetensors");
  const std::string text_path = folder.file("config.json");
  save_safetensors(path, {{"w", at::arange(4, at::kFloat)}});
  write_file_atomically(text_path, "former");
  std::vector<std::string> messages;
  {
    const FileLimit limit(4096);
    for (const std::int64_t elements : {5000, 1 << 20}) {
      messages.push_back(message_of<IoError>([&] {
        save_safetensors(path, {{"w", at::ones({elements}, at::kFloat)}});
      }));
    }
    messages.push_back(
        message_of<IoError>([&] { write_file_atomically(text_path, std::string(10'000, 'x')); }));
  }
  EXPECT_NE(messages[0].find(path + ": cannot write"), std::string::npos) << messages[0];
  EXPECT_NE(messages[1].find(path + ": cannot write"), std::string::npos) << messages[1];
  EXPECT_NE(messages[2].find(text_path + ": cannot write"), std::string::npos) << messages[2];
  EXPECT_TRUE(at::equal(SafetensorsFile(path).tensor("w"), at::arange(4, at::kFloat)));
  EXPECT_EQ(read_bytes(text_path), "former");
  const auto files = std::filesystem::directory_iterator(folder.path());
  EXPECT_EQ(std::distance(begin(files), end(files)), 2) << "temporary files are left";
}

// --- folders --------------------------------------------------------------------------------

class SafetensorsFolderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    save_safetensors(folder_.file("one.safetensors"), {{"a", at::ones({2}, at::kFloat)}});
    save_safetensors(folder_.file("two.safetensors"),
                     {{"b", at::ones({3}, at::kFloat)}, {"c", at::ones({4}, at::kFloat)}});
  }
  void write_index(const Json& map) {
    write_bytes(index_, Json{{"metadata", {{"total_size", 36}}}, {"weight_map", map}}.dump());
  }
  void expect_refused(const std::string& part) {
    const std::string message =
        message_of<DataError>([&] { const SafetensorsFolder opened(folder_.path()); });
    EXPECT_NE(message.find(index_), std::string::npos) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }

  TemporaryFolder folder_;
  std::string index_ = folder_.file("model.safetensors.index.json");
  Json map_{{"a", "one.safetensors"}, {"b", "two.safetensors"}, {"c", "two.safetensors"}};
};

TEST_F(SafetensorsFolderTest, ShardsAreReadByTheirIndex) {
  write_index(map_);
  const SafetensorsFolder opened(folder_.path());
  ASSERT_EQ(opened.entries().size(), 3U);
  for (const auto& [file, info] : opened.entries()) {
    EXPECT_EQ(file->tensor(info->name).numel(), info->name == "a" ? 2 : info->name == "b" ? 3 : 4);
  }
}

TEST_F(SafetensorsFolderTest, AnIndexThatLeavesTheFolderIsRefused) {
  for (const char* outside : {"../one.safetensors", "/etc/passwd", "..", "", "sub/one.safetensors",
                              "./one.safetensors", "one.safetensors/"}) {
    map_["a"] = outside;
    write_index(map_);
    expect_refused("\"" + std::string(outside) + "\" is not the name of a file in the folder");
  }
}

TEST_F(SafetensorsFolderTest, AnIndexThatDoesNotFitItsShardsIsRefused) {
  Json map = map_;
  map["d"] = "one.safetensors";
  write_index(map);
  expect_refused("tensor \"d\" is not in one.safetensors");
  map = map_;
  map["c"] = "one.safetensors";
  write_index(map);
  expect_refused("tensor \"c\" is not in one.safetensors");
  map = map_;
  map.erase("c");
  write_index(map);
  expect_refused("tensor \"c\" of two.safetensors is not listed");
  map = map_;
  map["a"] = 1;
  write_index(map);
  expect_refused("\"a\"");
  write_bytes(index_, R"({"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}})");
  expect_refused("\"a\" is there twice");
  write_bytes(index_, R"({"weight_map": ["one.safetensors"]})");
  expect_refused("weight_map is missing");
  write_bytes(index_, "{");
  expect_refused("not a JSON object");
}

TEST_F(SafetensorsFolderTest, MissingFilesAreNamed) {
  EXPECT_NE(message_of<IoError>([&] {
              const SafetensorsFolder opened(folder_.path());
            }).find(folder_.path() + ": neither model.safetensors nor"),
            std::string::npos);
  map_["d"] = "three.safetensors";
  write_index(map_);
  const std::string message =
      message_of<IoError>([&] { const SafetensorsFolder opened(folder_.path()); });
  EXPECT_NE(message.find(folder_.file("three.safetensors")), std::string::npos) << message;
}

}  // namespace
}  // namespace meshloom::model
