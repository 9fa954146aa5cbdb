#include "train/internal/run_records.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <system_error>
#include <utility>

#include "meshloom/core/error.h"
#include "train/internal/checkpoint_file.h"

namespace meshloom::train::detail {

namespace {

constexpr const char* kRecordsWhere = "train.records";

/// Replaces a file in one step, so that readers see the old text or the new.
void replace_file(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".writing";
  {
    std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
    file << text;
    file.close();
    if (!file) throw IoError(kRecordsWhere, fmt::format("cannot write {}", temporary));
  }
  std::error_code error;
  std::filesystem::rename(temporary, path, error);
  if (error) {
    throw IoError(kRecordsWhere, fmt::format("cannot rename {}: {}", temporary, error.message()));
  }
}

/// Keeps the complete lines of steps before `first_step`.
void cut_metrics(const std::string& path, std::int64_t first_step) {
  if (!std::filesystem::exists(path)) return;
  std::istringstream lines(read_whole(path));
  std::string kept;
  for (std::string text; std::getline(lines, text);) {
    const auto entry = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (entry.is_object() && entry.value("step", first_step) < first_step) kept += text + "\n";
  }
  replace_file(path, kept);
}

std::string prepare(const std::string& folder, std::int64_t first_step) {
  std::error_code error;
  std::filesystem::create_directories(folder + "/plans", error);
  if (error) {
    throw IoError(kRecordsWhere,
                  fmt::format("cannot create {}/plans: {}", folder, error.message()));
  }
  cut_metrics(folder + "/metrics.jsonl", first_step);
  cut_metrics(folder + "/ranks.jsonl", first_step);
  cut_metrics(folder + "/notices.jsonl", first_step);
  return folder;
}

nlohmann::ordered_json finite_or_null(double value) {
  return std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json(nullptr);
}

/// To microseconds, which is what a clock of a step is good for.
double rounded(double seconds) { return std::round(seconds * 1e6) / 1e6; }

}  // namespace

std::string to_json(const StepMetrics& metrics) {
  nlohmann::ordered_json entry;
  entry["step"] = metrics.step;
  entry["loss"] = finite_or_null(metrics.loss);
  entry["aux_loss"] = finite_or_null(metrics.aux_loss);
  entry["z_loss"] = finite_or_null(metrics.z_loss);
  entry["gradient_norm"] = finite_or_null(metrics.gradient_norm);
  entry["lr"] = metrics.lr;
  entry["tokens"] = metrics.tokens;
  entry["loss_tokens"] = metrics.loss_tokens;
  entry["samples"] = metrics.samples;
  entry["seconds"] = metrics.seconds;
  entry["tokens_per_second"] = finite_or_null(metrics.tokens_per_second);
  entry["balance_efficiency"] = finite_or_null(metrics.balance_efficiency);
  entry["measured_efficiency"] = finite_or_null(metrics.measured_efficiency);
  entry["planning_seconds"] = metrics.planning_seconds;
  entry["exchange_bytes"] = metrics.exchange_bytes;
  entry["skipped"] = metrics.skipped;
  for (const auto& [name, value] : metrics.extra) entry[name] = finite_or_null(value);
  if (!metrics.group_bytes.empty()) entry["group_bytes"] = metrics.group_bytes;
  for (const auto& [name, kind] : metrics.traffic) {
    entry["traffic"][name] = {{"inside_bytes", kind.inside_bytes},
                              {"between_bytes", kind.between_bytes},
                              {"seconds", rounded(kind.seconds)},
                              {"exposed_seconds", rounded(kind.exposed_seconds)}};
  }
  return entry.dump();
}

std::string ranks_json(const StepMetrics& metrics) {
  nlohmann::ordered_json entry{{"step", metrics.step}};
  const auto column = [&](const char* name, double RankTimes::*field) {
    auto& values = entry[name] = nlohmann::ordered_json::array();
    for (const RankTimes& rank : metrics.ranks) values.push_back(rounded(rank.*field));
  };
  column("planned", &RankTimes::planned);
  column("busy", &RankTimes::busy);
  column("load", &RankTimes::load);
  column("exposed", &RankTimes::exposed);
  return entry.dump();
}

std::string set_aside(const std::string& folder) {
  std::vector<std::filesystem::path> old;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (name == "metrics.jsonl" || name == "ranks.jsonl" || name == "notices.jsonl" ||
        name == "timeline.json" || name == "traffic.json" || name == "memory.json" ||
        name == "flight" || name == "config.yaml" || name == "plans" || name == "checkpoints" ||
        name.starts_with("events.out.tfevents")) {
      old.push_back(entry->path());
    }
  }
  if (old.empty()) return {};
  int number = 1;
  while (std::filesystem::exists(fmt::format("{}/previous-{}", folder, number))) ++number;
  const std::string target = fmt::format("{}/previous-{}", folder, number);
  try {
    std::filesystem::create_directories(target);
    for (const auto& path : old) std::filesystem::rename(path, target / path.filename());
  } catch (const std::filesystem::filesystem_error& failure) {
    throw IoError(kRecordsWhere, failure.what());
  }
  return target;
}

RunRecords::RunRecords(std::string folder, std::int64_t first_step)
    : folder_(std::move(folder)), events_(prepare(folder_, first_step), first_step) {
  metrics_.open(folder_ + "/metrics.jsonl", std::ios::binary | std::ios::app);
  if (!metrics_) {
    throw IoError(kRecordsWhere, fmt::format("cannot write {}/metrics.jsonl", folder_));
  }
  ranks_.open(folder_ + "/ranks.jsonl", std::ios::binary | std::ios::app);
}

void RunRecords::notice(std::int64_t step, const std::string& text) {
  const nlohmann::ordered_json entry{{"step", step}, {"text", text}};
  std::ofstream file(folder_ + "/notices.jsonl", std::ios::binary | std::ios::app);
  file << entry.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  file.close();
  if (!file) throw IoError(kRecordsWhere, fmt::format("cannot write {}/notices.jsonl", folder_));
}

void RunRecords::traffic(const std::string& json) { replace_file(folder_ + "/traffic.json", json); }

void RunRecords::memory(const std::string& json) { replace_file(folder_ + "/memory.json", json); }

void RunRecords::config(const std::string& yaml) { replace_file(folder_ + "/config.yaml", yaml); }

void RunRecords::plan(const plan::StepPlan& plan) {
  plan.save(fmt::format("{}/plans/step-{:08d}.json", folder_, plan.step));
}

void RunRecords::line(const std::string& text) {
  metrics_ << text << "\n" << std::flush;
  if (!metrics_) {
    throw IoError(kRecordsWhere, fmt::format("cannot write {}/metrics.jsonl", folder_));
  }
}

void RunRecords::step(const StepMetrics& metrics) {
  line(to_json(metrics));
  ranks_ << ranks_json(metrics) << "\n" << std::flush;
  if (!ranks_) throw IoError(kRecordsWhere, fmt::format("cannot write {}/ranks.jsonl", folder_));
  const std::pair<const char*, double> scalars[] = {
      {"train/loss", metrics.loss},
      {"train/aux_loss", metrics.aux_loss},
      {"train/z_loss", metrics.z_loss},
      {"train/gradient_norm", metrics.gradient_norm},
      {"train/lr", metrics.lr},
      {"step/seconds", metrics.seconds},
      {"step/tokens", static_cast<double>(metrics.tokens)},
      {"step/tokens_per_second", metrics.tokens_per_second},
      {"step/exchange_bytes", static_cast<double>(metrics.exchange_bytes)},
      {"balance/efficiency", metrics.balance_efficiency},
      {"balance/measured_efficiency", metrics.measured_efficiency},
      {"balance/planning_seconds", metrics.planning_seconds},
  };
  for (const auto& [tag, value] : scalars) events_.scalar(tag, metrics.step, value);
  events_.flush();
}

void RunRecords::evaluation(std::int64_t step, double loss) {
  nlohmann::ordered_json entry;
  entry["step"] = step;
  entry["evaluation_loss"] = finite_or_null(loss);
  line(entry.dump());
  events_.scalar("evaluation/loss", step, loss);
  events_.flush();
}

std::string trace_events(int rank, const std::deque<StepTrace>& traces) {
  using Clock = std::chrono::steady_clock;
  const auto offset = std::chrono::system_clock::now().time_since_epoch() -
                      std::chrono::duration_cast<std::chrono::system_clock::duration>(
                          Clock::now().time_since_epoch());
  const auto microseconds = [&](Clock::time_point at) {
    return std::chrono::duration<double, std::micro>(at.time_since_epoch() + offset).count();
  };
  std::string result = fmt::format(
      R"({{"name":"process_name","ph":"M","pid":{0},"tid":0,"args":{{"name":"rank {0}"}}}},
{{"name":"process_sort_index","ph":"M","pid":{0},"tid":0,"args":{{"sort_index":{0}}}}})",
      rank);
  std::int64_t flight = 0;
  for (const StepTrace& trace : traces) {
    for (const parallel::Span& span : trace.spans) {
      const std::string common = fmt::format(
          R"("name":"{}","cat":"{}","pid":{},"tid":0,"args":{{"step":{},"slot":{},"unit":{}}})",
          to_string(span.kind), to_string(span.kind), rank, trace.step, span.slot, span.unit);
      const double begin = microseconds(span.begin);
      const double end = microseconds(span.end);
      if (span.kind == parallel::Span::Kind::kExchange) {
        // Transfers overlap computation and each other: asynchronous events.
        ++flight;
        result += fmt::format(",\n{{\"ph\":\"b\",\"id\":\"{}.{}\",\"ts\":{:.3f},{}}}", rank, flight,
                              begin, common);
        result += fmt::format(",\n{{\"ph\":\"e\",\"id\":\"{}.{}\",\"ts\":{:.3f},{}}}", rank, flight,
                              end, common);
      } else {
        result += fmt::format(",\n{{\"ph\":\"X\",\"ts\":{:.3f},\"dur\":{:.3f},{}}}", begin,
                              end - begin, common);
      }
    }
  }
  return result;
}

}  // namespace meshloom::train::detail
