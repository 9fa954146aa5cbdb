#include <fmt/format.h>

#include <charconv>

#include "meshloom/core/error.h"
#include "meshloom/plan/exchange_choice.h"

namespace meshloom::plan {
namespace {

constexpr const char* kRulesWhere = "plan.exchange_rules";

/// Text up to the next separator; what is left stays in `text`.
std::string_view next_part(std::string_view& text, char separator) {
  const auto end = text.find(separator);
  const auto part = text.substr(0, end);
  text = end == std::string_view::npos ? std::string_view{} : text.substr(end + 1);
  return part;
}

std::string_view stripped(std::string_view text) {
  const auto first = text.find_first_not_of(' ');
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(' ') - first + 1);
}

template <class Number>
Number number(std::string_view text, std::string_view rule, const char* what) {
  Number value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < 0) {
    throw InvalidArgument(kRulesWhere,
                          fmt::format("rule \"{}\": {} is \"{}\", expected a-b, a-, -b, a "
                                      "or nothing",
                                      rule, what, text));
  }
  return value;
}

template <class Number>
void range(std::string_view text, std::string_view rule, const char* what, Number& least,
           Number& most) {
  if (text.empty()) return;
  const auto dash = text.find('-');
  if (dash == std::string_view::npos) {
    least = most = number<Number>(text, rule, what);
    return;
  }
  if (dash > 0) least = number<Number>(text.substr(0, dash), rule, what);
  if (dash + 1 < text.size()) most = number<Number>(text.substr(dash + 1), rule, what);
  if (least > most) {
    throw InvalidArgument(kRulesWhere,
                          fmt::format("rule \"{}\": {} is \"{}\", expected the smaller bound first",
                                      rule, what, text));
  }
}

Exchange exchange_named(std::string_view name, std::string_view rule) {
  for (const Exchange exchange :
       {Exchange::kRing, Exchange::kAllGather, Exchange::kUlysses, Exchange::kRingUlysses}) {
    if (name == to_string(exchange)) return exchange;
  }
  throw InvalidArgument(
      kRulesWhere, fmt::format("rule \"{}\": exchange \"{}\", expected ring, all_gather, ulysses, "
                               "ring_ulysses, ring_ulysses/U or auto",
                               rule, name));
}

ExchangeRule parse_rule(std::string_view rule) {
  std::string_view rest = rule;
  std::string_view name = stripped(next_part(rest, ':'));
  ExchangeRule result;
  const auto slash = name.find('/');
  if (slash != std::string_view::npos) {
    result.group = number<int>(name.substr(slash + 1), rule, "the head group");
    name = name.substr(0, slash);
    if (name != "ring_ulysses" || result.group < 2) {
      throw InvalidArgument(
          kRulesWhere,
          fmt::format("rule \"{}\": expected a head group of at least 2 after ring_ulysses/, and "
                      "none after other names",
                      rule));
    }
  }
  if (name != "auto") {
    result.exchange = exchange_named(name, rule);
  }
  range(stripped(next_part(rest, ':')), rule, "the range of degrees", result.least_degree,
        result.most_degree);
  range(stripped(next_part(rest, ':')), rule, "the range of tokens", result.least_tokens,
        result.most_tokens);
  if (!rest.empty()) {
    throw InvalidArgument(
        kRulesWhere,
        fmt::format("rule \"{}\": \"{}\" is left over, expected NAME[:DEGREES[:TOKENS]]", rule,
                    rest));
  }
  return result;
}

}  // namespace

std::vector<ExchangeRule> parse_exchange_rules(std::string_view text) {
  std::vector<ExchangeRule> rules;
  if (stripped(text).empty()) return rules;
  while (true) {
    const bool last = text.find(',') == std::string_view::npos;
    rules.push_back(parse_rule(next_part(text, ',')));
    if (last) return rules;
  }
}

}  // namespace meshloom::plan
