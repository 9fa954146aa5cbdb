#include <fmt/format.h>

#include <cmath>
#include <iterator>
#include <string>

#include "meshloom/core/error.h"
#include "meshloom/core/hash.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {
namespace {

using Buffer = fmt::memory_buffer;

template <class... Args>
void put(Buffer& out, fmt::format_string<Args...> text, Args&&... args) {
  fmt::format_to(std::back_inserter(out), text, std::forward<Args>(args)...);
}

/// The shortest decimal that reads back as the same double, always recognisable as a float.
void put_number(Buffer& out, const char* field, double value) {
  if (!std::isfinite(value)) {
    throw PlanError("plan.to_json", fmt::format("{} is {}, which JSON cannot hold", field, value));
  }
  const std::string text = fmt::format("{}", value);
  put(out, "{}", text);
  if (text.find_first_of(".e") == std::string::npos) put(out, ".0");
}

void put_string(Buffer& out, std::string_view text) {
  put(out, "\"");
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      put(out, "\\{}", c);
    } else if (byte < 0x20) {
      put(out, "\\u{:04x}", static_cast<unsigned>(byte));
    } else {
      put(out, "{}", c);
    }
  }
  put(out, "\"");
}

void put_unit(Buffer& out, const Unit& unit) {
  put(out, "{{\"ranks\": [");
  for (std::size_t i = 0; i < unit.ranks.size(); ++i)
    put(out, "{}{}", i ? ", " : "", unit.ranks[i]);
  put(out, "], \"samples\": [");
  for (std::size_t i = 0; i < unit.samples.size(); ++i) {
    put(out, "{}{}", i ? ", " : "", unit.samples[i]);
  }
  put(out, "], \"exchange\": \"{}\"", to_string(unit.exchange));
  if (unit.ulysses_degree != 0) put(out, ", \"ulysses_degree\": {}", unit.ulysses_degree);
  put(out, ", \"offload\": ");
  put_number(out, "offload", unit.offload);
  put(out, "}}");
}

}  // namespace

std::string StepPlan::to_json() const {
  Buffer out;
  put(out, "{{\n  \"format\": \"meshloom.plan/1\",\n  \"step\": {},\n  \"strategy\": ", step);
  put_string(out, strategy);
  put(out,
      ",\n  \"layout\": {{\"tp\": {}, \"hdp\": {}, \"pp\": {}, \"ep\": {}, \"chunks\": {}}},\n"
      "  \"capacity_tokens\": {},\n  \"lockstep\": \"{}\",\n",
      layout.tp, layout.hdp, layout.pp, layout.ep, layout.chunks, capacity_tokens,
      to_string(lockstep));
  if (ranks_per_node != 0) put(out, "  \"ranks_per_node\": {},\n", ranks_per_node);
  if (memory != MemoryModel{}) {
    put(out, "  \"memory\": {{\"layers\": {}, \"resident_layers\": {}", memory.layers,
        memory.resident_layers);
    if (memory.transfer != 0.0) {
      put(out, ", \"transfer\": ");
      put_number(out, "memory.transfer", memory.transfer);
    }
    put(out, "}},\n");
  }
  put(out, "  \"cost\": {{\"quadratic\": ");
  put_number(out, "cost.quadratic", cost.quadratic);
  put(out, ", \"linear\": ");
  put_number(out, "cost.linear", cost.linear);
  put(out, ", \"fixed\": ");
  put_number(out, "cost.fixed", cost.fixed);
  put(out, ", \"exchange\": ");
  put_number(out, "cost.exchange", cost.exchange);
  put(out, "}},\n  \"samples\": [");
  for (std::size_t i = 0; i < samples.size(); ++i) {
    put(out, "{}\n    {{\"id\": {}, \"tokens\": {}, \"loss_tokens\": {}}}", i ? "," : "",
        samples[i].id, samples[i].tokens, samples[i].loss_tokens);
  }
  put(out, "\n  ],\n  \"slots\": [");
  for (std::size_t s = 0; s < slots.size(); ++s) {
    put(out, "{}\n    {{\"units\": [", s ? "," : "");
    for (std::size_t u = 0; u < slots[s].units.size(); ++u) {
      put(out, "{}\n      ", u ? "," : "");
      put_unit(out, slots[s].units[u]);
    }
    put(out, "\n    ]}}");
  }
  put(out, "\n  ],\n  \"predicted\": {{\"makespan\": ");
  put_number(out, "predicted.makespan", predicted.makespan);
  put(out, ", \"lower_bound\": ");
  put_number(out, "predicted.lower_bound", predicted.lower_bound);
  put(out, ", \"efficiency\": ");
  put_number(out, "predicted.efficiency", predicted.efficiency);
  put(out, ", \"exchange_tokens\": {}", predicted.exchange_tokens);
  if (predicted.step_time) {
    put(out, ", \"step_time\": ");
    put_number(out, "predicted.step_time", *predicted.step_time);
  }
  put(out, "}}\n}}\n");
  return fmt::to_string(out);
}

std::uint64_t StepPlan::hash() const { return hash_bytes(to_json()); }

}  // namespace meshloom::plan
