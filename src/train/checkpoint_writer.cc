#include <ATen/core/Tensor.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/core/error.h"
#include "meshloom/train/checkpoint.h"
#include "train/internal/checkpoint_file.h"
#include "train/internal/collective.h"

namespace meshloom::train {

namespace {

constexpr const char* kWriteWhere = "train.write_checkpoint";

using Json = nlohmann::json;

const char* safetensors_dtype(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return "F64";
    case at::kFloat:
      return "F32";
    case at::kBFloat16:
      return "BF16";
    default:
      throw NotSupported(kWriteWhere,
                         fmt::format("states of dtype {} are not built", c10::toString(type)));
  }
}

/// A slice of one tensor on its way to the file.
struct OutgoingSlice {
  std::string state;
  std::string name;
  std::vector<std::int64_t> shape;
  TensorBlock block;
  at::Tensor values;
};

void cut(const CheckpointPart& part, std::vector<OutgoingSlice>& result) {
  const parallel::FlatRange range = part.range;
  for (const ShardState& state : part.states) {
    MESHLOOM_CHECK_EQ(state.values.numel(), range.size(), kWriteWhere, "elements of a state");
    for (const model::ParameterSpec& spec : part.table.parameters) {
      const std::int64_t begin = std::max(spec.offset, range.begin);
      const std::int64_t end = std::min(spec.offset + spec.elements(), range.end);
      std::int64_t at = begin - range.begin;
      for (TensorBlock& block :
           blocks_of_range(spec.shape, begin - spec.offset, end - spec.offset)) {
        const std::int64_t size = block.elements();
        for (std::size_t d = 0; d < spec.corner.size(); ++d) block.offset[d] += spec.corner[d];
        result.push_back({.state = state.name,
                          .name = spec.name,
                          .shape = spec.whole_shape(),
                          .block = std::move(block),
                          .values = state.values.narrow(0, at, size)});
        at += size;
      }
    }
  }
}

/// A safetensors file of slices, and what the manifest says about them.
Json write_slices(const std::string& path, const std::vector<OutgoingSlice>& slices) {
  Json header = Json::object();
  Json listing = Json::array();
  std::int64_t position = 0;
  for (const OutgoingSlice& slice : slices) {
    const std::int64_t bytes =
        slice.values.numel() * static_cast<std::int64_t>(slice.values.element_size());
    const char* dtype = safetensors_dtype(slice.values.scalar_type());
    header[fmt::format("{}/{}@{}", slice.state, slice.name, fmt::join(slice.block.offset, ","))] = {
        {"dtype", dtype},
        {"shape", slice.block.extent},
        {"data_offsets", {position, position + bytes}}};
    listing.push_back({{"state", slice.state},
                       {"tensor", slice.name},
                       {"shape", slice.shape},
                       {"dtype", dtype},
                       {"offset", slice.block.offset},
                       {"extent", slice.block.extent},
                       {"begin", position},
                       {"bytes", bytes}});
    position += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::array<unsigned char, 8> length{};
  for (std::size_t i = 0; i < length.size(); ++i) {
    length[i] = static_cast<unsigned char>(text.size() >> (8 * i));
  }
  detail::DurableFile file(path);
  file.write(length.data(), length.size());
  file.write(text.data(), text.size());
  for (std::size_t i = 0; i < slices.size(); ++i) {
    const at::Tensor values = slices[i].values.cpu().contiguous();
    const auto bytes = static_cast<std::size_t>(values.nbytes());
    file.write(values.const_data_ptr(), bytes);
    listing[i]["begin"] = listing[i]["begin"].get<std::int64_t>() +
                          static_cast<std::int64_t>(length.size() + text.size());
    listing[i]["xxh64"] = detail::hex64(detail::xxhash64(values.const_data_ptr(), bytes));
  }
  file.close();
  return {{"bytes", file.bytes()}, {"slices", std::move(listing)}};
}

Json layout_json(const Layout& layout) {
  return {{"tp", layout.tp},
          {"hdp", layout.hdp},
          {"pp", layout.pp},
          {"ep", layout.ep},
          {"chunks", layout.chunks}};
}

/// Runs on one rank; a failure is everybody's.
template <class Body>
void on_rank(comm::Communicator& group, int rank, const Body& body) {
  std::optional<detail::LocalFailure> failure;
  if (group.rank() == rank) {
    try {
      body();
    } catch (const std::exception&) {
      failure = detail::current_failure();
    }
  }
  detail::agree(group, kWriteWhere, failure);
}

void remove_quietly(const std::string& path) {
  std::error_code ignored;
  std::filesystem::remove_all(path, ignored);
}

}  // namespace

std::string checkpoint_name(std::int64_t step) { return fmt::format("step-{:08d}", step); }

void write_checkpoint(const std::string& root, const CheckpointInfo& info,
                      const model::ParameterTable& table, parallel::FlatRange range,
                      const std::vector<ShardState>& states, int keep, comm::Communicator group) {
  write_checkpoint(root, info, {{.table = table, .range = range, .states = states}}, keep,
                   std::move(group));
}

void write_checkpoint(const std::string& root, const CheckpointInfo& info,
                      const std::vector<CheckpointPart>& parts, int keep,
                      comm::Communicator group) {
  const std::string name = checkpoint_name(info.step);
  const std::string target = fmt::format("{}/{}", root, name);
  const std::string temporary = fmt::format("{}/.{}.writing", root, name);
  const auto file_name = [](std::size_t rank) {
    return fmt::format("rank-{:05d}.safetensors", rank);
  };

  on_rank(group, 0, [&] {
    std::error_code error;
    std::filesystem::remove_all(temporary, error);
    std::filesystem::create_directories(temporary, error);
    if (error) {
      throw IoError(kWriteWhere, fmt::format("cannot create {}: {}", temporary, error.message()));
    }
  });
  std::optional<detail::LocalFailure> failure;
  std::string listing;
  try {
    const auto own = static_cast<std::size_t>(group.rank());
    std::vector<OutgoingSlice> slices;
    for (const CheckpointPart& part : parts) cut(part, slices);
    listing = write_slices(fmt::format("{}/{}", temporary, file_name(own)), slices).dump();
  } catch (const std::exception&) {
    failure = detail::current_failure();
  }
  if (const auto first = detail::first_failure(group, failure)) {
    if (group.rank() == 0) remove_quietly(temporary);
    throw_error(first->code, kWriteWhere,
                fmt::format("{}; earlier checkpoints are untouched", first->message));
  }

  const std::vector<std::string> listings = detail::gather_text(group, listing);
  on_rank(group, 0, [&] {
    try {
      Json files = Json::array();
      for (std::size_t r = 0; r < listings.size(); ++r) {
        Json entry = Json::parse(listings[r]);
        entry["name"] = file_name(r);
        files.push_back(std::move(entry));
      }
      const Json manifest = {{"format", detail::kCheckpointFormat},
                             {"step", info.step},
                             {"layout", layout_json(info.layout)},
                             {"texts", info.texts},
                             {"numbers", info.numbers},
                             {"files", std::move(files)}};
      const std::string text = manifest.dump();
      const std::string sum = detail::hex64(detail::xxhash64(text.data(), text.size()));
      detail::write_durably(fmt::format("{}/{}", temporary, detail::kManifestName),
                            fmt::format("{{\"xxh64\":\"{}\",\"manifest\":{}}}\n", sum, text));
      detail::sync_folder(temporary);
      // A checkpoint of the same step is replaced only once the new one is complete.
      const std::string replaced = fmt::format("{}/.{}.replaced", root, name);
      remove_quietly(replaced);
      if (std::filesystem::exists(target)) std::filesystem::rename(target, replaced);
      std::filesystem::rename(temporary, target);
      detail::sync_folder(root);
      remove_quietly(replaced);
      if (keep > 0) {
        const std::vector<std::string> all = list_checkpoints(root);
        for (std::size_t i = static_cast<std::size_t>(keep); i < all.size(); ++i) {
          remove_quietly(all[i]);
        }
      }
    } catch (const std::filesystem::filesystem_error& error) {
      remove_quietly(temporary);
      throw IoError(kWriteWhere, error.what());
    } catch (const Error&) {
      remove_quietly(temporary);
      throw;
    }
  });
}

}  // namespace meshloom::train
