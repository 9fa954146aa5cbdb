#include "meshloom/data/loader.h"

#include <fmt/format.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>

#include "data/internal/document_cache.h"
#include "data/internal/hash.h"
#include "data/internal/step_stream.h"
#include "meshloom/core/error.h"

namespace meshloom::data {
namespace {

constexpr int kStateVersion = 1;

nlohmann::json membership_options(const std::vector<WeightedSource>& sources,
                                  const LoaderOptions& options) {
  nlohmann::json weights = nlohmann::json::array();
  for (const WeightedSource& source : sources) weights.push_back(source.weight);
  return {{"global_batch_tokens", options.global_batch_tokens},
          {"max_document_tokens", options.max_document_tokens},
          {"seed", options.seed},
          {"held_out_fraction", options.held_out_fraction},
          {"weights", std::move(weights)}};
}

}  // namespace

class Loader::Impl {
 public:
  Impl(std::vector<WeightedSource> sources, const LoaderOptions& options)
      : sources_(std::move(sources)),
        options_(options),
        stream_(sources_, options_),
        cache_(options.memory_bytes),
        options_json_(membership_options(sources_, options_)),
        delivered_(stream_.start()),
        ahead_(delivered_) {
    if (options_.prefetch_steps < 1) {
      throw InvalidArgument("data.loader", fmt::format("prefetch_steps is {}, expected >= 1",
                                                       options_.prefetch_steps));
    }
    for (const WeightedSource& weighted : sources_) {
      sources_json_.push_back({{"name", weighted.source->name()},
                               {"documents", weighted.source->size()},
                               {"fingerprint", weighted.source->fingerprint()}});
    }
  }

  ~Impl() { stop(); }

  StepMembership next() {
    std::unique_lock lock(mutex_);
    if (!producer_.joinable()) producer_ = std::thread([this] { produce(); });
    const auto ready = [this] { return !queue_.empty() || failure_ != nullptr; };
    if (!produced_.wait_for(lock, options_.timeout, ready)) {
      const auto [source, document] = in_work_;
      lock.unlock();
      throw Timeout("data.next",
                    fmt::format("no step within {} ms; in work: {}", options_.timeout.count(),
                                describe_document(source, document)));
    }
    if (queue_.empty()) std::rethrow_exception(failure_);
    auto [step, position] = std::move(queue_.front());
    queue_.pop_front();
    delivered_ = std::move(position);
    lock.unlock();
    wanted_.notify_one();
    return step;
  }

  StepMembership held_out(std::int64_t max_tokens) const {
    return stream_.held_out(max_tokens, [this](std::int64_t source, std::int64_t document) {
      return fetch(source, document);
    });
  }

  Document load(const DocumentRef& ref) const {
    check(ref);
    const auto document = fetch(ref.source, ref.document);
    const auto size = static_cast<std::int64_t>(document->tokens.size());
    if (ref.begin < 0 || ref.end <= ref.begin || ref.end > size) {
      throw DataError("data.load", fmt::format("{} has {} tokens now, [{}, {}) were asked for",
                                               describe_document(ref.source, ref.document), size,
                                               ref.begin, ref.end));
    }
    return document->slice(ref.begin, ref.end);
  }

  std::string describe(const DocumentRef& ref) const {
    check(ref);
    return fmt::format("{} tokens [{}, {})", describe_document(ref.source, ref.document), ref.begin,
                       ref.end);
  }

  std::string state() const {
    const std::lock_guard lock(mutex_);
    const nlohmann::json json{{"version", kStateVersion},
                              {"options", options_json_},
                              {"sources", sources_json_},
                              {"position", nlohmann::json::parse(delivered_.to_json())}};
    return json.dump();
  }

  void restore(const std::string& text) {
    detail::StreamPosition position = parse_state(text);
    stop();
    const std::lock_guard lock(mutex_);
    stopping_ = false;
    queue_.clear();
    failure_ = nullptr;
    ahead_ = position;
    delivered_ = std::move(position);
  }

  std::string fingerprint() const {
    std::string all = options_json_.dump();
    for (const auto& source : sources_json_) all += source.at("fingerprint").get<std::string>();
    return detail::hash128_hex(all);
  }

 private:
  struct Step {
    StepMembership membership;
    detail::StreamPosition position;  ///< behind it
  };

  std::shared_ptr<const Document> fetch(std::int64_t source, std::int64_t index) const {
    if (auto known = cache_.find(source, index)) return known;
    const Source& from = *sources_[static_cast<std::size_t>(source)].source;
    std::shared_ptr<const Document> document;
    try {
      document = std::make_shared<const Document>(from.load(index));
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {  // a source of the user's own
      throw DataError("data.load", fmt::format("{}: {}", from.describe(index), error.what()));
    }
    validate(*document, source, index);
    cache_.put(source, index, document);
    return document;
  }

  void validate(const Document& document, std::int64_t source, std::int64_t index) const {
    if (!document.loss_mask.empty() && document.loss_mask.size() != document.tokens.size()) {
      throw DataError("data.load", fmt::format("{}: loss_mask has {} entries, tokens {}",
                                               describe_document(source, index),
                                               document.loss_mask.size(), document.tokens.size()));
    }
    for (std::size_t i = 0; i < document.tokens.size(); ++i) {
      const std::int64_t token = document.tokens[i];
      if (token >= 0 && (options_.vocab_size == 0 || token < options_.vocab_size)) continue;
      throw DataError("data.load", fmt::format("{}: token {} is {}, expected 0 .. {}",
                                               describe_document(source, index), i, token,
                                               options_.vocab_size == 0
                                                   ? std::string("2^31 - 1")
                                                   : fmt::to_string(options_.vocab_size - 1)));
    }
  }

  void check(const DocumentRef& ref) const {
    if (ref.source < 0 || ref.source >= static_cast<std::int64_t>(sources_.size()) ||
        ref.document < 0 ||
        ref.document >= sources_[static_cast<std::size_t>(ref.source)].source->size()) {
      throw DataError("data.load", fmt::format("source {}, document {} is not one of these sources",
                                               ref.source, ref.document));
    }
  }

  std::string describe_document(std::int64_t source, std::int64_t index) const {
    return sources_[static_cast<std::size_t>(source)].source->describe(index);
  }

  detail::StreamPosition parse_state(const std::string& text) const {
    const char* where = "data.restore";
    nlohmann::json json;
    try {
      json = nlohmann::json::parse(text);
      if (json.at("version").get<int>() != kStateVersion) {
        throw DataError(where, fmt::format("state version {}, expected {}",
                                           json.at("version").dump(), kStateVersion));
      }
      for (const auto& [key, value] : options_json_.items()) {
        const auto& given = json.at("options").at(key);
        if (given != value) {
          throw DataError(where, fmt::format("the state was written with {} {}, this loader has {}",
                                             key, given.dump(), value.dump()));
        }
      }
      if (json.at("sources").size() != sources_json_.size()) {
        throw DataError(where, fmt::format("the state has {} sources, the loader {}",
                                           json.at("sources").size(), sources_json_.size()));
      }
      for (std::size_t i = 0; i < sources_json_.size(); ++i) {
        const auto& given = json.at("sources").at(i);
        const auto& mine = sources_json_[i];
        if (given.at("fingerprint") == mine.at("fingerprint")) continue;
        throw DataError(where, fmt::format("source {} is not what it was: {} documents of {} then, "
                                           "{} of {} now, or other contents or tokenizer",
                                           i, given.at("documents").dump(), given.at("name").dump(),
                                           mine.at("documents").dump(), mine.at("name").dump()));
      }
      const auto position =
          detail::StreamPosition::from_json(json.at("position").dump(), sources_.size());
      stream_.check(position);
      return position;
    } catch (const nlohmann::json::exception& error) {
      throw DataError(where, fmt::format("malformed state: {}", error.what()));
    }
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wanted_.notify_all();
    if (producer_.joinable()) producer_.join();
    producer_ = {};
  }

  void produce() {
    try {
      while (true) {
        {
          std::unique_lock lock(mutex_);
          wanted_.wait(lock, [this] {
            return stopping_ || static_cast<std::int64_t>(queue_.size()) < options_.prefetch_steps;
          });
          if (stopping_) return;
        }
        StepMembership step =
            stream_.advance(ahead_, [this](std::int64_t source, std::int64_t document) {
              {
                const std::lock_guard lock(mutex_);
                if (stopping_) throw Stopped();
                in_work_ = {source, document};
              }
              return fetch(source, document);
            });
        const std::lock_guard lock(mutex_);
        queue_.push_back({std::move(step), ahead_});
        produced_.notify_all();
      }
    } catch (const Stopped&) {
    } catch (...) {
      const std::lock_guard lock(mutex_);
      failure_ = std::current_exception();
      produced_.notify_all();
    }
  }

  struct Stopped {};

  std::vector<WeightedSource> sources_;
  LoaderOptions options_;
  detail::StepStream stream_;  ///< the producer's, but for held_out, which is const
  mutable detail::DocumentCache cache_;
  nlohmann::json options_json_;
  std::vector<nlohmann::json> sources_json_;

  mutable std::mutex mutex_;
  std::condition_variable produced_;
  std::condition_variable wanted_;
  std::deque<Step> queue_;
  std::exception_ptr failure_;
  std::pair<std::int64_t, std::int64_t> in_work_{0, 0};
  bool stopping_ = false;
  detail::StreamPosition delivered_;
  detail::StreamPosition ahead_;  ///< the producer's while it runs
  std::thread producer_;
};

Loader::Loader(std::vector<WeightedSource> sources, const LoaderOptions& options)
    : impl_(std::make_unique<Impl>(std::move(sources), options)) {}

Loader::~Loader() = default;

StepMembership Loader::next() { return impl_->next(); }

StepMembership Loader::held_out(std::int64_t max_tokens) const {
  return impl_->held_out(max_tokens);
}

Document Loader::load(const DocumentRef& ref) const { return impl_->load(ref); }

std::string Loader::describe(const DocumentRef& ref) const { return impl_->describe(ref); }

std::string Loader::state() const { return impl_->state(); }

void Loader::restore(const std::string& state) { impl_->restore(state); }

std::string Loader::fingerprint() const { return impl_->fingerprint(); }

}  // namespace meshloom::data
