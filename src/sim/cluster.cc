#include "meshloom/sim/cluster.h"

#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <fstream>
#include <sstream>

#include "meshloom/core/check.h"

namespace meshloom::sim {
namespace {

/// Reads one mapping key by key and refuses what it does not know.
class Reader {
 public:
  Reader(const YAML::Node& node, std::string name, std::string prefix)
      : node_(node), name_(std::move(name)), prefix_(std::move(prefix)) {
    if (!node_.IsMap()) fail("", "expected a mapping");
  }

  template <class T>
  void read(const char* key, T& value) {
    known_ += (known_.empty() ? "" : ", ") + std::string(key);
    const auto child = node_[key];
    if (!child) return;
    ++found_;
    try {
      value = child.template as<T>();
    } catch (const YAML::Exception&) {
      fail(key, "wrong type");
    }
  }

  void read_link(const char* key, Link& link) {
    known_ += (known_.empty() ? "" : ", ") + std::string(key);
    const auto child = node_[key];
    if (!child) return;
    ++found_;
    Reader reader(child, name_, prefix_ + key + ".");
    reader.read("bandwidth", link.bandwidth);
    reader.read("latency", link.latency);
    reader.finish();
    if (!(link.bandwidth > 0.0)) fail(std::string(key) + ".bandwidth", "expected > 0");
    if (!(link.latency >= 0.0)) fail(std::string(key) + ".latency", "expected >= 0");
  }

  void finish() const {
    if (found_ == node_.size()) return;
    for (const auto& entry : node_) {
      const auto key = entry.first.as<std::string>();
      if ((", " + known_ + ",").find(", " + key + ",") == std::string::npos) {
        fail(key, "unknown key; known: " + known_);
      }
    }
    fail("", "a key is repeated");
  }

  void need(bool holds, const std::string& key, const std::string& what) const {
    if (!holds) fail(key, what);
  }

  [[noreturn]] void fail(const std::string& key, const std::string& what) const {
    throw DataError("sim.cluster", fmt::format("{}: {}{}: {}", name_, prefix_, key, what));
  }

 private:
  YAML::Node node_;
  std::string name_;
  std::string prefix_;
  std::string known_;
  std::size_t found_ = 0;
};

YAML::Node parse(const std::string& text, const std::string& name) {
  try {
    return YAML::Load(text);
  } catch (const YAML::Exception& error) {
    throw DataError("sim.cluster", fmt::format("{}: {}", name, error.what()));
  }
}

// 7B model [BS fig. 6]: ms a layer, S in thousands of tokens.
constexpr double kAttentionQuadratic = 0.00925;
constexpr double kAttentionLinear = 0.156;
constexpr double kMlpLinear = 0.227;
constexpr double kLayers = 32;
// The figure times forward; backward is twice that.
constexpr double kForwardAndBackward = 3.0;

}  // namespace

Cluster Cluster::from_yaml(const std::string& text, const std::string& name) {
  return from_yaml(text, name, Cluster{});
}

Cluster Cluster::from_yaml(const std::string& text, const std::string& name, const Cluster& base) {
  Cluster cluster = base;
  Reader reader(parse(text, name), name, "");
  reader.read("ranks_per_node", cluster.ranks_per_node);
  reader.read("nodes", cluster.nodes);
  reader.read("compute_rate", cluster.compute_rate);
  reader.read("slow_ranks", cluster.slow_ranks);
  reader.read_link("inside", cluster.inside);
  reader.read_link("between", cluster.between);
  reader.read("node_bandwidth", cluster.node_bandwidth);
  reader.read_link("host", cluster.host);
  reader.read("loader_seconds", cluster.loader_seconds);
  reader.read("overlap", cluster.overlap);
  YAML::Node workload;
  reader.read("workload", workload);
  reader.finish();
  reader.need(cluster.ranks_per_node >= 1, "ranks_per_node", "expected at least 1");
  reader.need(cluster.nodes >= 0, "nodes", "expected at least 1, or 0 for as many as needed");
  reader.need(cluster.node_bandwidth >= 0.0, "node_bandwidth", "expected >= 0");
  reader.need(cluster.compute_rate > 0.0, "compute_rate", "expected > 0");
  for (const auto& [rank, rate] : cluster.slow_ranks) {
    reader.need(rank >= 0 && rate > 0.0, "slow_ranks", "expected ranks and rates > 0");
  }
  reader.need(cluster.loader_seconds >= 0.0, "loader_seconds", "expected >= 0");
  reader.need(cluster.overlap >= 0.0 && cluster.overlap <= 1.0, "overlap", "expected 0 .. 1");
  return cluster;
}

Workload Workload::from_yaml(const std::string& text, const std::string& name,
                             const Workload& base) {
  Workload workload = base;
  const YAML::Node root = parse(text, name);
  if (!root.IsMap() || !root["workload"]) return workload;
  Reader reader(root["workload"], name, "workload.");
  const auto amount = [&](const char* key, double& value) {
    reader.read(key, value);
    reader.need(value >= 0.0, key, "expected >= 0");
  };
  reader.read("layers", workload.layers);
  amount("seconds_per_work", workload.seconds_per_work);
  amount("forward_share", workload.forward_share);
  amount("weight_gradient_share", workload.weight_gradient_share);
  plan::ExchangeShape& attention = workload.attention;
  reader.read("heads", attention.heads);
  reader.read("key_value_heads", attention.key_value_heads);
  reader.read("head_dim", attention.head_dim);
  reader.read("window", attention.window);
  reader.read("element_bytes", attention.element_bytes);
  reader.read("wire_bytes", attention.wire_bytes);
  reader.read("statistic_bytes", attention.statistic_bytes);
  amount("hidden_bytes", workload.hidden_bytes);
  amount("saved_bytes", workload.saved_bytes);
  amount("parameter_bytes", workload.parameter_bytes);
  amount("gradient_bytes", workload.gradient_bytes);
  amount("expert_parameter_bytes", workload.expert_parameter_bytes);
  amount("expert_gradient_bytes", workload.expert_gradient_bytes);
  reader.read("zero", workload.zero);
  amount("mixture_share", workload.mixture_share);
  reader.read("recompute", workload.recompute);
  amount("dispatch_bytes", workload.dispatch_bytes);
  amount("expert_share", workload.expert_share);
  reader.read("stage_shares", workload.stage_shares);
  amount("step_seconds", workload.step_seconds);
  reader.finish();
  reader.need(workload.layers >= 1, "layers", "expected at least 1");
  reader.need(workload.zero >= 1 && workload.zero <= 3, "zero", "expected 1, 2 or 3");
  reader.need(workload.expert_share <= 1.0, "expert_share", "expected at most 1");
  reader.need(workload.mixture_share <= 1.0, "mixture_share", "expected at most 1");
  reader.need(workload.recompute == "none" || workload.recompute == "selective" ||
                  workload.recompute == "full",
              "recompute", "expected none, selective or full");
  for (const double share : workload.stage_shares) {
    reader.need(share >= 0.0, "stage_shares", "expected parts >= 0");
  }
  try {
    attention.validate();
  } catch (const InvalidArgument& error) {
    reader.need(false, "heads", error.what());
  }
  reader.need(workload.seconds_per_work > 0.0, "seconds_per_work", "expected > 0");
  reader.need(workload.forward_share + workload.weight_gradient_share <= 1.0, "forward_share",
              "expected at most 1 with weight_gradient_share");
  return workload;
}

Cluster Cluster::load(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) throw IoError("sim.cluster", fmt::format("cannot read {}", path));
  return from_yaml(text.str(), path);
}

CostModel Workload::llama_7b_cost() {
  const double scale = kLayers * kForwardAndBackward * 1e-3;
  return {.quadratic = kAttentionQuadratic * 1e-6 * scale,
          .linear = (kAttentionLinear + kMlpLinear) * 1e-3 * scale,
          .fixed = 0.0,
          .exchange = 0.0};
}

Workload Workload::llama_7b() {
  Workload workload;
  workload.layers = static_cast<int>(kLayers);
  workload.seconds_per_work = 1.0;
  workload.hidden_bytes = 4096 * 2;
  workload.saved_bytes = 34 * 4096;  // Korthikanti et al. 2022, eq. 1, with flash attention
  workload.parameter_bytes = 6.7e9 * 2;
  workload.gradient_bytes = 6.7e9 * 4;
  return workload;
}

}  // namespace meshloom::sim
