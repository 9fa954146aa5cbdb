#include "train/internal/setup.h"

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <map>
#include <utility>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/plan/verifier.h"
#include "train/internal/collective.h"

namespace meshloom::train::detail {

Hosts find_hosts(comm::Communicator& world) {
  std::array<char, 256> name{};
  ::gethostname(name.data(), name.size() - 1);
  const std::vector<std::string> names = gather_text(world, name.data());
  Hosts hosts;
  hosts.local_size = 0;
  const auto own = static_cast<std::size_t>(world.rank());
  std::map<std::string, int> sizes;
  std::size_t changes = 0;
  for (std::size_t r = 0; r < names.size(); ++r) {
    ++sizes[names[r]];
    if (r > 0 && names[r] != names[r - 1]) ++changes;
    const auto known = std::find(hosts.names.begin(), hosts.names.end(), names[r]);
    hosts.host_of.push_back(static_cast<int>(known - hosts.names.begin()));
    if (known == hosts.names.end()) hosts.names.push_back(names[r]);
    if (names[r] != names[own]) continue;
    ++hosts.local_size;
    if (r < own) ++hosts.local_rank;
  }
  const bool equal = std::all_of(sizes.begin(), sizes.end(), [&](const auto& entry) {
    return entry.second == hosts.local_size;
  });
  if (sizes.size() > 1 && equal && changes == sizes.size() - 1) {
    hosts.ranks_per_host = hosts.local_size;
  }
  return hosts;
}

at::Device parse_device(const std::string& name, int local_rank) {
  if (name == "cpu") return at::Device(at::kCPU);
  if (!name.starts_with("cuda")) {
    throw InvalidArgument("train.device",
                          fmt::format("got \"{}\", expected cpu, cuda or cuda:N", name));
  }
  const int count = at::globalContext().hasCUDA() ? at::detail::getCUDAHooks().deviceCount() : 0;
  if (count == 0) {
    throw NotSupported(
        "train.device",
        fmt::format("device \"{}\": no CUDA device, or a LibTorch without CUDA", name));
  }
  int index = local_rank % count;
  if (name.size() > 5) {
    std::from_chars(name.data() + 5, name.data() + name.size(), index);
  }
  if (index >= count) {
    throw NotSupported("train.device",
                       fmt::format("device \"{}\": this host has {} CUDA devices", name, count));
  }
  return {at::kCUDA, static_cast<at::DeviceIndex>(index)};
}

at::ScalarType parse_dtype_name(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "float64") return at::kDouble;
  if (name == "bfloat16") return at::kBFloat16;
  throw InvalidArgument("train.dtype",
                        fmt::format("got \"{}\", expected one of: float32, bfloat16, "
                                    "float64",
                                    name));
}

namespace {

/// The layouts of so many ranks whose tp and pp are nearest, as text.
std::string nearest_layouts(const Layout& layout, int world_size) {
  constexpr std::size_t kShown = 3;
  std::vector<std::pair<int, Layout>> found;
  for (int tp = 1; tp <= world_size; ++tp) {
    for (int pp = 1; world_size % tp == 0 && pp <= world_size / tp; ++pp) {
      if (world_size / tp % pp != 0) continue;
      Layout other = layout;
      other.tp = tp;
      other.pp = pp;
      other.hdp = world_size / tp / pp;
      if (other.hdp % other.ep != 0) other.ep = 1;
      found.emplace_back(std::abs(tp - layout.tp) + std::abs(pp - layout.pp), other);
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::string text;
  for (std::size_t i = 0; i < std::min(kShown, found.size()); ++i) {
    text += (i > 0 ? "; " : "") + found[i].second.to_string();
  }
  return text;
}

}  // namespace

Layout resolve_layout(Layout layout, int world_size, const char* where) {
  if (layout.hdp == 0) layout.hdp = std::max(1, world_size / std::max(1, layout.tp * layout.pp));
  layout.validate();
  if (layout.world_size() != world_size) {
    throw InvalidArgument(
        where, fmt::format("layout {} needs {} ranks, the world has {}; nearest that fit: {}",
                           layout.to_string(), layout.world_size(), world_size,
                           nearest_layouts(layout, world_size)));
  }
  return layout;
}

parallel::ModelPlacement place(const model::ModelConfig& model, const Layout& layout,
                               const ParallelSection& section, const Hosts& hosts) {
  const int pieces = layout.pp * layout.chunks;
  std::vector<int> split = section.split;
  if (split.empty() && section.split_by == "cost" && pieces <= model.layers) {
    split = parallel::split_by_cost(model, pieces);
  }
  parallel::ModelPlacement placement = parallel::place_model(
      model, layout, section.pipeline, std::move(split), parallel::parse_zero(section.zero));
  if (section.ranks_per_node < 0 ||
      (section.ranks_per_node > 0 && layout.world_size() % section.ranks_per_node != 0)) {
    throw InvalidArgument("train.parallel",
                          fmt::format("ranks_per_node is {}, expected a divisor of the {} ranks, "
                                      "or 0 for the ranks of a host",
                                      section.ranks_per_node, layout.world_size()));
  }
  placement.ranks_per_node =
      section.ranks_per_node > 0 ? section.ranks_per_node : hosts.ranks_per_host;
  return placement;
}

int hdp_ranks_per_node(const parallel::ModelPlacement& placement) {
  const int tp = placement.layout.tp;
  return placement.ranks_per_node % tp == 0 ? placement.ranks_per_node / tp : 0;
}

void verify_step(const plan::StepPlan& plan, const plan::CompileOptions& options) {
  plan::verify(plan);
  plan::verify(plan, plan::compile(plan, options));
}

plan::CompileOptions compile_options(const parallel::ModelPlacement& placement,
                                     const std::string& schedule) {
  return {.layers = static_cast<int>(placement.config.layers),
          .schedule = schedule,
          .table = nullptr,
          .split = placement.split};
}

}  // namespace meshloom::train::detail
