#include "meshloom/train/memory_report.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/parallel/memory.h"
#include "train/internal/collective.h"
#include "train/internal/memory_check.h"
#include "train/internal/process_memory.h"

namespace meshloom::train {

namespace {

constexpr const char* kMemoryWhere = "train.memory_check";
constexpr double kMiB = 1 << 20;
constexpr double kGiB = 1 << 30;

std::string in_units(std::int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  return value < kGiB ? fmt::format("{:.1f} MiB", value / kMiB)
                      : fmt::format("{:.2f} GiB", value / kGiB);
}

}  // namespace

const plan::MemoryForecast& MemoryReport::fullest() const {
  return *std::max_element(stages.begin(), stages.end(),
                           [](const auto& a, const auto& b) { return a.total() < b.total(); });
}

std::string MemoryReport::text() const {
  const plan::MemoryForecast& most = fullest();
  std::string parts;
  for (std::size_t p = 0; p < plan::kMemoryParts; ++p) {
    const std::int64_t bytes = most.bytes[p];
    if (bytes == 0) continue;
    parts += fmt::format("{}{} {}", parts.empty() ? "" : ", ",
                         plan::to_string(static_cast<plan::MemoryPart>(p)), in_units(bytes));
  }
  const std::int64_t base = baseline[static_cast<std::size_t>(most.rank)];
  std::string result = fmt::format(
      "memory: rank {} holds most, up to {} of tensors ({}), beside {} of its process\n"
      "memory: {} needs up to {} for {} rank{}",
      most.rank, in_units(most.total()), parts, in_units(base), room.name, in_units(room.needed),
      room.ranks, room.ranks == 1 ? "" : "s");
  if (room.has == 0) return result;
  result += fmt::format(" and has {}", in_units(room.has));
  if (fits()) return result;
  result += fmt::format("; {} are missing", in_units(room.needed - room.has));
  const std::int64_t share = room.has / room.ranks - (room.needed / room.ranks - most.total());
  for (const plan::MemoryChange& change : changes) {
    result += fmt::format("\nmemory: {}: {} of tensors on the fullest rank, {}", change.setting,
                          in_units(change.bytes),
                          change.bytes <= share ? "which fits" : "the least there is");
  }
  if (changes.empty()) result += "\nmemory: no setting holds less; use more ranks";
  return result;
}

namespace detail {

MemoryOutlook report_memory(comm::Communicator& world, const Hosts& hosts,
                            const parallel::ModelPlacement& placement, const TrainConfig& config,
                            const c10::Device& device) {
  const auto element = static_cast<std::int64_t>(c10::elementSize(parse_dtype_name(config.dtype)));
  const plan::MemorySetting setting = parallel::memory_setting(placement, config.parallel.pipeline,
                                                               config.parallel.recompute, element);
  const plan::StepLimits limits{.capacity = config.capacity_tokens,
                                .global_batch = config.global_batch_tokens,
                                .longest_document = config.data.max_document_tokens > 0
                                                        ? config.data.max_document_tokens
                                                        : config.global_batch_tokens};
  MemoryReport report;
  report.setting = setting;
  report.limits = limits;
  report.stages = plan::forecast_memory(setting, limits);

  const ProcessMemory own = process_memory();
  const std::int64_t room = device.is_cpu() ? host_memory() : device_memory(device).total;
  const auto around =
      gather_numbers(world, {static_cast<double>(::getpid()),
                             static_cast<double>(own.own + own.files), static_cast<double>(room)});
  std::map<std::pair<int, double>, int> of_process;  // ranks
  for (std::size_t r = 0; r < around.size(); ++r) ++of_process[{hosts.host_of[r], around[r][0]}];
  for (std::size_t r = 0; r < around.size(); ++r) {
    const int sharing = of_process[{hosts.host_of[r], around[r][0]}];
    report.baseline.push_back(static_cast<std::int64_t>(around[r][1]) / sharing);
  }

  // Ranks of a host share its memory; a device is a rank's own.
  std::map<int, MemoryReport::Room> rooms;
  for (std::size_t r = 0; r < around.size(); ++r) {
    const auto rank = static_cast<int>(r);
    const auto& stage =
        report.stages[static_cast<std::size_t>(placement.layout.coordinates(rank).pp)];
    const std::int64_t beside = device.is_cpu() ? report.baseline[r] : 0;
    auto& shared = rooms[device.is_cpu() ? hosts.host_of[r] : rank];
    const std::string& host = hosts.names[static_cast<std::size_t>(hosts.host_of[r])];
    shared.name = device.is_cpu() ? "host " + host : fmt::format("the device of rank {}", rank);
    ++shared.ranks;
    shared.needed += stage.total() + beside;
    shared.states += stage.states() + beside;
    shared.has = static_cast<std::int64_t>(around[r][2]);
  }
  const auto missing = [](const auto& entry) { return entry.second.needed - entry.second.has; };
  report.room = std::max_element(rooms.begin(), rooms.end(), [&](const auto& a, const auto& b) {
                  return missing(a) < missing(b);
                })->second;
  if (!report.fits()) {
    const std::int64_t beside =
        device.is_cpu() ? *std::max_element(report.baseline.begin(), report.baseline.end()) : 0;
    report.changes =
        plan::memory_changes(setting, limits, report.room.has / report.room.ranks - beside);
  }
  return {.report = std::move(report),
          .own = {.before = own.own,
                  .sharing = of_process[{hosts.host_of[static_cast<std::size_t>(world.rank())],
                                         static_cast<double>(::getpid())}]}};
}

void check_memory(const MemoryReport& report, const std::string& policy) {
  if (report.fits() || policy == "warn") return;
  if (policy == "auto" && report.room.states <= report.room.has) return;
  throw InvalidArgument(
      kMemoryWhere,
      fmt::format("the run does not fit the memory{}:\n{}\nmemory_check: warn starts it anyway",
                  policy == "auto" ? ", whatever the data is" : "", report.text()));
}

std::int64_t measured_peak(const c10::Device& device, const OwnMemory& own) {
  if (!device.is_cpu()) return device_memory(device).peak;
  // Pages of files are no tensors, and come as code is first run.
  const ProcessMemory now = process_memory();
  return std::max<std::int64_t>(0, now.peak - now.files - own.before) / own.sharing;
}

std::string memory_json(const MemoryReport& report, const Layout& layout,
                        const std::vector<double>& measured) {
  nlohmann::ordered_json result;
  result["room"] = {{"name", report.room.name},
                    {"ranks", report.room.ranks},
                    {"needed", report.room.needed},
                    {"has", report.room.has}};
  auto& ranks = result["ranks"] = nlohmann::ordered_json::array();
  for (std::size_t r = 0; r < measured.size(); ++r) {
    const auto stage = static_cast<std::size_t>(layout.coordinates(static_cast<int>(r)).pp);
    const plan::MemoryForecast& forecast = report.stages[stage];
    nlohmann::ordered_json parts;
    for (std::size_t p = 0; p < plan::kMemoryParts; ++p) {
      parts[std::string(plan::to_string(static_cast<plan::MemoryPart>(p)))] = forecast.bytes[p];
    }
    ranks.push_back({{"predicted", forecast.total()},
                     {"measured", static_cast<std::int64_t>(measured[r])},
                     {"baseline", report.baseline[r]},
                     {"parts", std::move(parts)}});
  }
  return result.dump(1) + "\n";
}

}  // namespace detail
}  // namespace meshloom::train
