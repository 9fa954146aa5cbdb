#include "data/internal/step_stream.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"

namespace meshloom::data::detail {
namespace {

constexpr const char* kWhere = "data.loader";

double unit_interval(std::uint64_t key) {
  return static_cast<double>(random_bits(random_key("held out", 0), key) >> 11) * 0x1.0p-53;
}

}  // namespace

StepStream::StepStream(const std::vector<WeightedSource>& sources, const LoaderOptions& options)
    : batch_(options.global_batch_tokens),
      longest_(options.max_document_tokens > 0 ? options.max_document_tokens
                                               : options.global_batch_tokens),
      seed_(options.seed) {
  if (sources.empty()) throw InvalidArgument(kWhere, "no sources were given");
  if (batch_ < 1) {
    throw InvalidArgument(kWhere, fmt::format("global_batch_tokens is {}, expected > 0", batch_));
  }
  if (options.max_document_tokens < 0) {
    throw InvalidArgument(kWhere, fmt::format("max_document_tokens is {}, expected >= 0",
                                              options.max_document_tokens));
  }
  if (!(options.held_out_fraction >= 0.0 && options.held_out_fraction < 1.0)) {
    throw InvalidArgument(kWhere, fmt::format("held_out_fraction is {}, expected within [0, 1)",
                                              options.held_out_fraction));
  }
  for (const WeightedSource& weighted : sources) {
    if (weighted.source == nullptr) throw InvalidArgument(kWhere, "a source is null");
    if (!(weighted.weight > 0.0) || !std::isfinite(weighted.weight)) {
      throw InvalidArgument(kWhere, fmt::format("weight of {} is {}, expected > 0 and finite",
                                                weighted.source->name(), weighted.weight));
    }
    Stream stream{weighted.source.get(), weighted.weight, {}, {}, -1};
    const std::int64_t count = stream.source->size();
    if (count <= 0) {
      throw DataError(kWhere, fmt::format("{} has no documents", stream.source->name()));
    }
    for (std::int64_t i = 0; i < count; ++i) {
      stream.documents.push_back({stream.source->order_key(i), i});
    }
    streams_.push_back(std::move(stream));
  }
  if (options.held_out_fraction > 0.0) hold_out(options.held_out_fraction);
}

void StepStream::hold_out(double fraction) {
  std::int64_t count = 0;
  std::tuple<double, std::size_t, std::size_t> lowest{2.0, 0, 0};
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    const auto& all = streams_[s].documents;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const double hash = unit_interval(all[i].key);
      if (hash < fraction) ++count;
      if (all.size() > 1) lowest = std::min(lowest, {hash, s, i});
    }
  }
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    std::vector<Entry> kept;
    auto& all = streams_[s].documents;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const double hash = unit_interval(all[i].key);
      const bool only = count == 0 && std::get<0>(lowest) < 2.0 && std::get<1>(lowest) == s &&
                        std::get<2>(lowest) == i;
      if (hash < fraction || only) {
        held_out_.push_back({random_bits(random_key("held out order", 0), all[i].key),
                             static_cast<std::int64_t>(s), all[i].document});
      } else {
        kept.push_back(all[i]);
      }
    }
    if (kept.empty()) {
      throw DataError(kWhere, fmt::format("{}: held_out_fraction {} leaves none of {} documents to "
                                          "train on",
                                          streams_[s].source->name(), fraction, all.size()));
    }
    all = std::move(kept);
  }
  std::sort(held_out_.begin(), held_out_.end(), [](const HeldOut& a, const HeldOut& b) {
    return std::tie(a.key, a.source, a.document) < std::tie(b.key, b.source, b.document);
  });
}

StreamPosition StepStream::start() const {
  StreamPosition position;
  position.sources.resize(streams_.size());
  return position;
}

void StepStream::check(const StreamPosition& position) const {
  bool good = position.step >= 0 && position.sources.size() == streams_.size();
  for (std::size_t s = 0; good && s < streams_.size(); ++s) {
    const SourcePosition& at = position.sources[s];
    good = at.pass >= 0 && at.next >= 0 && at.tokens >= 0 && at.pass_tokens >= 0 &&
           at.next < static_cast<std::int64_t>(streams_[s].documents.size());
  }
  if (good && position.pending) {
    const auto& pending = *position.pending;
    good = pending.source >= 0 && pending.source < static_cast<std::int64_t>(streams_.size()) &&
           pending.document >= 0 && pending.begin >= 0 &&
           pending.document < streams_[static_cast<std::size_t>(pending.source)].source->size();
  }
  if (!good) {
    throw DataError("data.restore", "the position lies outside the sources: " + position.to_json());
  }
}

void StepStream::order_pass(std::size_t source, std::int64_t pass) {
  Stream& stream = streams_[source];
  if (stream.order_pass == pass) return;
  const std::uint64_t key = random_key(fmt::format("pass {} of source {}", pass, source), seed_);
  std::vector<Entry> shuffled = stream.documents;
  for (Entry& entry : shuffled) entry.key = random_bits(key, entry.key);
  std::sort(shuffled.begin(), shuffled.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.key, a.document) < std::tie(b.key, b.document);
  });
  stream.order.clear();
  for (const Entry& entry : shuffled) stream.order.push_back(entry.document);
  stream.order_pass = pass;
}

// The next document with tokens: fewest tokens for its weight, the first of equals.
StreamPosition::Pending StepStream::draw(StreamPosition& position, const Fetch& fetch,
                                         std::shared_ptr<const Document>& document) {
  while (true) {
    std::size_t source = 0;
    double least = 0.0;
    for (std::size_t s = 0; s < streams_.size(); ++s) {
      const double share = static_cast<double>(position.sources[s].tokens) / streams_[s].weight;
      if (s == 0 || share < least) {
        source = s;
        least = share;
      }
    }
    SourcePosition& at = position.sources[source];
    order_pass(source, at.pass);
    const auto& order = streams_[source].order;
    const std::int64_t index = order[static_cast<std::size_t>(at.next)];
    document = fetch(static_cast<std::int64_t>(source), index);
    const auto tokens = static_cast<std::int64_t>(document->tokens.size());
    at.tokens += tokens;
    at.pass_tokens += tokens;
    ++at.next;
    if (at.next == static_cast<std::int64_t>(order.size())) {
      if (at.pass_tokens == 0) {
        throw DataError(kWhere, fmt::format("{}: none of its {} documents holds any tokens",
                                            streams_[source].source->name(), order.size()));
      }
      at = {at.pass + 1, 0, at.tokens, 0};
    }
    if (tokens > longest_) ++position.split_documents;
    if (tokens > 0) return {static_cast<std::int64_t>(source), index, 0};
    ++position.skipped_documents;
  }
}

void StepStream::add(StepMembership& step, const DocumentRef& ref, const Document& document) const {
  const std::int64_t tokens = ref.end - ref.begin;
  std::int64_t loss_tokens = tokens - 1;
  if (!document.loss_mask.empty()) {
    loss_tokens = std::count_if(document.loss_mask.begin() + ref.begin + 1,
                                document.loss_mask.begin() + ref.end,
                                [](std::uint8_t target) { return target != 0; });
  }
  step.samples.push_back({static_cast<std::int64_t>(step.samples.size()), tokens, loss_tokens});
  step.refs.push_back(ref);
}

StepMembership StepStream::advance(StreamPosition& position, const Fetch& fetch) {
  StreamPosition next = position;
  StepMembership step;
  step.step = next.step++;
  std::int64_t total = 0;
  while (true) {
    std::shared_ptr<const Document> document;
    StreamPosition::Pending piece;
    if (next.pending) {
      piece = *next.pending;
      document = fetch(piece.source, piece.document);
    } else {
      piece = draw(next, fetch, document);
    }
    const auto size = static_cast<std::int64_t>(document->tokens.size());
    next.pending.reset();
    while (piece.begin < size) {
      const std::int64_t end = std::min(piece.begin + longest_, size);
      if (!step.samples.empty() && total + end - piece.begin > batch_) {
        next.pending = piece;
        break;
      }
      add(step, {piece.source, piece.document, piece.begin, end}, *document);
      total += end - piece.begin;
      piece.begin = end;
    }
    // A full step draws nothing more: a draw would only be put back.
    if (next.pending || total >= batch_) break;
  }
  step.epoch = next.sources[0].pass;
  for (const SourcePosition& at : next.sources) step.epoch = std::min(step.epoch, at.pass);
  step.split_documents = next.split_documents;
  step.skipped_documents = next.skipped_documents;
  position = std::move(next);
  return step;
}

StepMembership StepStream::held_out(std::int64_t max_tokens, const Fetch& fetch) const {
  StepMembership step;
  std::int64_t total = 0;
  for (const HeldOut& held : held_out_) {
    const std::shared_ptr<const Document> document = fetch(held.source, held.document);
    const auto size = static_cast<std::int64_t>(document->tokens.size());
    if (size > longest_) ++step.split_documents;
    if (size == 0) ++step.skipped_documents;
    for (std::int64_t begin = 0; begin < size; begin += longest_) {
      const std::int64_t end = std::min(begin + longest_, size);
      if (!step.samples.empty() && total + end - begin > max_tokens) return step;
      add(step, {held.source, held.document, begin, end}, *document);
      total += end - begin;
    }
  }
  return step;
}

std::string StreamPosition::to_json() const {
  nlohmann::json sources_json = nlohmann::json::array();
  for (const SourcePosition& at : sources) {
    sources_json.push_back({{"pass", at.pass},
                            {"next", at.next},
                            {"tokens", at.tokens},
                            {"pass_tokens", at.pass_tokens}});
  }
  nlohmann::json json{{"step", step},
                      {"split_documents", split_documents},
                      {"skipped_documents", skipped_documents},
                      {"sources", std::move(sources_json)}};
  if (pending) {
    json["pending"] = {
        {"source", pending->source}, {"document", pending->document}, {"begin", pending->begin}};
  }
  return json.dump();
}

StreamPosition StreamPosition::from_json(const std::string& text, std::size_t sources) {
  try {
    const auto json = nlohmann::json::parse(text);
    StreamPosition position;
    json.at("step").get_to(position.step);
    json.at("split_documents").get_to(position.split_documents);
    json.at("skipped_documents").get_to(position.skipped_documents);
    for (const auto& at : json.at("sources")) {
      position.sources.push_back(
          {at.at("pass").get<std::int64_t>(), at.at("next").get<std::int64_t>(),
           at.at("tokens").get<std::int64_t>(), at.at("pass_tokens").get<std::int64_t>()});
    }
    if (json.contains("pending")) {
      const auto& pending = json["pending"];
      position.pending = Pending{pending.at("source").get<std::int64_t>(),
                                 pending.at("document").get<std::int64_t>(),
                                 pending.at("begin").get<std::int64_t>()};
    }
    if (position.sources.size() != sources) {
      throw DataError("data.restore", fmt::format("the state has {} sources, the loader {}",
                                                  position.sources.size(), sources));
    }
    return position;
  } catch (const nlohmann::json::exception& error) {
    throw DataError("data.restore", fmt::format("malformed position: {}", error.what()));
  }
}

}  // namespace meshloom::data::detail
