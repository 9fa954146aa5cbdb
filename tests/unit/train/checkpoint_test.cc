#include "meshloom/train/checkpoint.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <mutex>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "unit/temporary_folder.h"

namespace meshloom::train {
namespace {

model::ParameterTable odd_table() {
  model::ParameterTable table;
  std::int64_t offset = 0;
  const std::vector<std::vector<std::int64_t>> shapes = {{7, 5}, {3}, {2, 3, 4}, {1}, {11, 2}};
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    model::ParameterSpec spec;
    spec.name = "tensor." + std::to_string(i);
    spec.shape = shapes[i];
    spec.offset = offset;
    offset += spec.elements();
    table.parameters.push_back(spec);
  }
  table.elements = offset;
  return table;
}

parallel::FlatRange share(std::int64_t elements, int rank, int ranks) {
  return {elements * rank / ranks, elements * (rank + 1) / ranks};
}

/// Writes `values` (and their negatives as a second state) from `ranks` ranks.
void write(const std::string& root, int ranks, std::int64_t step, const at::Tensor& values,
           int keep = 0) {
  const model::ParameterTable table = odd_table();
  comm::run_thread_ranks(ranks, [&](comm::Communicator world) {
    const parallel::FlatRange range = share(table.elements, world.rank(), ranks);
    const at::Tensor own = values.narrow(0, range.begin, range.size());
    CheckpointInfo info;
    info.step = step;
    info.layout = Layout{.hdp = ranks};
    info.texts = {{"loader", "at \"17\""}};
    info.numbers = {{"cost", 0.1}};
    write_checkpoint(root, info, table, range, {{"master", own}, {"exp_avg", own.neg()}}, keep,
                     world);
  });
}

at::Tensor read(const std::string& folder, int ranks, const std::string& state) {
  const model::ParameterTable table = odd_table();
  const CheckpointReader reader(folder);
  std::vector<at::Tensor> parts;
  for (int r = 0; r < ranks; ++r) {
    const parallel::FlatRange range = share(table.elements, r, ranks);
    at::Tensor part = at::zeros({range.size()}, at::kDouble);
    reader.read(table, range, state, part);
    parts.push_back(part);
  }
  return at::cat(parts);
}

at::Tensor counting() { return at::arange(odd_table().elements, at::kDouble); }

TEST(CheckpointBlocks, CoverTheRangeInMemoryOrder) {
  const std::vector<std::int64_t> shape = {3, 4, 5};
  const std::int64_t elements = 60;
  const at::Tensor all = at::arange(elements, at::kLong).view(shape);
  for (std::int64_t begin = 0; begin < elements; ++begin) {
    for (std::int64_t end = begin; end <= elements; ++end) {
      const std::vector<TensorBlock> blocks = blocks_of_range(shape, begin, end);
      EXPECT_LE(blocks.size(), 5U);
      std::int64_t expected = begin;
      for (const TensorBlock& block : blocks) {
        at::Tensor part = all;
        for (std::size_t d = 0; d < shape.size(); ++d) {
          part = part.narrow(static_cast<std::int64_t>(d), block.offset[d], block.extent[d]);
        }
        ASSERT_TRUE(part.flatten().equal(at::arange(expected, expected + part.numel(), at::kLong)));
        expected += part.numel();
      }
      ASSERT_EQ(expected, end);
    }
  }
}

TEST(Checkpoint, AnyNumberOfRanksReadsAnyOther) {
  for (const int writers : {1, 2, 3, 5, 8}) {
    const TemporaryFolder root;
    write(root.path(), writers, 12, counting());
    const std::vector<std::string> found = list_checkpoints(root.path());
    ASSERT_EQ(found.size(), 1U);
    const CheckpointReader reader(found[0]);
    EXPECT_EQ(reader.info().step, 12);
    EXPECT_EQ(reader.info().layout.hdp, writers);
    EXPECT_EQ(reader.info().texts.at("loader"), "at \"17\"");
    EXPECT_EQ(reader.info().numbers.at("cost"), 0.1);
    reader.verify();
    for (const int readers : {1, 2, 4, 7}) {
      EXPECT_TRUE(read(found[0], readers, "master").equal(counting())) << writers << readers;
      EXPECT_TRUE(read(found[0], readers, "exp_avg").equal(counting().neg()));
    }
  }
}

TEST(Checkpoint, KeepsTheNewestAndReplacesTheSameStep) {
  const TemporaryFolder root;
  for (const std::int64_t step : {1, 2, 3, 10}) write(root.path(), 2, step, counting(), 2);
  write(root.path(), 2, 10, counting().mul(2), 2);
  const std::vector<std::string> found = list_checkpoints(root.path());
  ASSERT_EQ(found.size(), 2U);
  EXPECT_NE(found[0].find("step-00000010"), std::string::npos);
  EXPECT_NE(found[1].find("step-00000003"), std::string::npos);
  EXPECT_TRUE(read(found[0], 3, "master").equal(counting().mul(2)));
  std::size_t entries = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(root.path())) {
    ++entries;
  }
  EXPECT_EQ(entries, 2U);
}

TEST(Checkpoint, DamageIsNamed) {
  const TemporaryFolder root;
  write(root.path(), 2, 5, counting());
  const std::string folder = list_checkpoints(root.path()).at(0);
  const std::string file = folder + "/rank-00001.safetensors";
  {
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(-3, std::ios::end);
    stream.put('!');
  }
  const std::string flipped =
      message_of<DataError>([&] { static_cast<void>(read(folder, 1, "exp_avg")); });
  EXPECT_NE(flipped.find(file), std::string::npos) << flipped;
  EXPECT_NE(flipped.find("checksum"), std::string::npos);
  EXPECT_FALSE(message_of<DataError>([&] { CheckpointReader(folder).verify(); }).empty());

  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 1);
  EXPECT_NE(message_of<DataError>([&] { CheckpointReader reader(folder); }).find("bytes, expected"),
            std::string::npos);
  std::filesystem::remove(file);
  EXPECT_NE(message_of<DataError>([&] { CheckpointReader reader(folder); }).find("is missing"),
            std::string::npos);

  std::string text;
  {
    std::ifstream stream(folder + "/manifest.json");
    text.assign(std::istreambuf_iterator<char>(stream), {});
  }
  text.replace(text.find("\"step\":5"), 8, "\"step\":6");
  std::ofstream(folder + "/manifest.json") << text;
  EXPECT_NE(message_of<DataError>([&] { CheckpointReader reader(folder); }).find("is damaged"),
            std::string::npos);
  std::ofstream(folder + "/manifest.json") << text.substr(0, 100);
  EXPECT_NE(message_of<DataError>([&] { CheckpointReader reader(folder); }).find("is damaged"),
            std::string::npos);
}

TEST(Checkpoint, OtherShapesAndMissingTensorsAreRefused) {
  const TemporaryFolder root;
  write(root.path(), 2, 5, counting());
  const CheckpointReader reader(list_checkpoints(root.path()).at(0));
  model::ParameterTable table = odd_table();
  at::Tensor values = at::zeros({table.elements}, at::kDouble);
  std::swap(table.parameters[0].shape[0], table.parameters[0].shape[1]);
  EXPECT_NE(message_of<DataError>([&] {
              reader.read(table, {0, table.elements}, "master", values);
            }).find("has shape [7, 5], the model's is [5, 7]"),
            std::string::npos);
  table = odd_table();
  table.parameters[1].name = "another";
  EXPECT_NE(message_of<DataError>([&] {
              reader.read(table, {0, table.elements}, "master", values);
            }).find("no tensor \"another\""),
            std::string::npos);
  EXPECT_NE(message_of<DataError>([&] {
              reader.read(table, {0, table.elements}, "momentum", values);
            }).find("no state \"momentum\""),
            std::string::npos);
}

TEST(Checkpoint, FullDiskFailsOnAllRanksAndKeepsTheOldOne) {
  const TemporaryFolder root;
  write(root.path(), 3, 1, counting());
  // The limit stands for a full disk: writes beyond it fail.
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit old{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  rlimit tight = old;
  tight.rlim_cur = 600;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &tight), 0);
  const model::ParameterTable table = odd_table();
  std::mutex mutex;
  std::vector<std::string> messages;
  comm::run_thread_ranks(3, [&](comm::Communicator world) {
    const parallel::FlatRange range = share(table.elements, world.rank(), 3);
    CheckpointInfo info;
    info.step = 2;
    const std::string message = message_of<IoError>([&] {
      write_checkpoint(root.path(), info, table, range,
                       {{"master", at::zeros({range.size()}, at::kDouble)}}, 1, world);
    });
    world.barrier().wait();  // the group stays usable
    const std::lock_guard lock(mutex);
    messages.push_back(message);
  });
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  ASSERT_EQ(messages.size(), 3U);
  EXPECT_NE(messages[0].find("/3: cannot write"), std::string::npos) << messages[0];
  EXPECT_EQ(messages[0], messages[1]);
  EXPECT_EQ(messages[0], messages[2]);
  const std::vector<std::string> found = list_checkpoints(root.path());
  ASSERT_EQ(found.size(), 1U);
  EXPECT_TRUE(read(found[0], 2, "master").equal(counting()));
  EXPECT_FALSE(std::filesystem::exists(root.file(".step-00000002.writing")));
}

}  // namespace
}  // namespace meshloom::train
