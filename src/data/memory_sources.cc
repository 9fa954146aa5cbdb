#include <fmt/format.h>

#include <utility>

#include "data/internal/hash.h"
#include "meshloom/core/error.h"
#include "meshloom/data/sources.h"

namespace meshloom::data {
namespace {

void check_mask(const Document& document, const std::string& source, std::size_t index) {
  if (!document.loss_mask.empty() && document.loss_mask.size() != document.tokens.size()) {
    throw DataError("data.documents",
                    fmt::format("{}[{}]: loss_mask has {} entries, tokens {}", source, index,
                                document.loss_mask.size(), document.tokens.size()));
  }
}

class MemorySource final : public Source {
 public:
  MemorySource(std::vector<Document> documents, std::string name)
      : documents_(std::move(documents)), name_(std::move(name)) {
    std::string hashes;
    for (std::size_t i = 0; i < documents_.size(); ++i) {
      const Document& document = documents_[i];
      check_mask(document, name_, i);
      hashes += detail::hash128_hex({reinterpret_cast<const char*>(document.tokens.data()),
                                     document.tokens.size() * sizeof(std::int32_t)});
      hashes += detail::hash128_hex(
          {reinterpret_cast<const char*>(document.loss_mask.data()), document.loss_mask.size()});
    }
    fingerprint_ = detail::hash128_hex(hashes);
  }

  const std::string& name() const override { return name_; }
  std::int64_t size() const override { return static_cast<std::int64_t>(documents_.size()); }
  Document load(std::int64_t index) const override {
    return documents_.at(static_cast<std::size_t>(index));
  }
  std::string fingerprint() const override { return fingerprint_; }

 private:
  std::vector<Document> documents_;
  std::string name_;
  std::string fingerprint_;
};

class CallbackSource final : public Source {
 public:
  CallbackSource(std::string name, std::int64_t size, std::function<Document(std::int64_t)> load)
      : name_(std::move(name)), size_(size), load_(std::move(load)) {}

  const std::string& name() const override { return name_; }
  std::int64_t size() const override { return size_; }
  Document load(std::int64_t index) const override { return load_(index); }

 private:
  std::string name_;
  std::int64_t size_;
  std::function<Document(std::int64_t)> load_;
};

class ConcatenatedSource final : public Source {
 public:
  explicit ConcatenatedSource(std::vector<std::shared_ptr<Source>> sources)
      : sources_(std::move(sources)) {
    for (const auto& source : sources_) {
      if (source == nullptr) throw InvalidArgument("data.concatenate", "a source is null");
      name_ += (name_.empty() ? "" : " + ") + source->name();
      ends_.push_back((ends_.empty() ? 0 : ends_.back()) + source->size());
    }
  }

  const std::string& name() const override { return name_; }
  std::int64_t size() const override { return ends_.empty() ? 0 : ends_.back(); }
  Document load(std::int64_t index) const override {
    const auto [source, local] = find(index);
    return source->load(local);
  }
  std::string describe(std::int64_t index) const override {
    const auto [source, local] = find(index);
    return source->describe(local);
  }
  std::uint64_t order_key(std::int64_t index) const override {
    const auto [source, local] = find(index);
    return source->order_key(local);
  }
  std::string cache_key(std::int64_t index) const override {
    const auto [source, local] = find(index);
    return source->cache_key(local);
  }
  std::string fingerprint() const override {
    std::string all;
    for (const auto& source : sources_) all += source->fingerprint();
    return detail::hash128_hex(all);
  }

 private:
  std::pair<const Source*, std::int64_t> find(std::int64_t index) const {
    for (std::size_t i = 0; i < sources_.size(); ++i) {
      if (index < ends_[i]) return {sources_[i].get(), index - (i == 0 ? 0 : ends_[i - 1])};
    }
    throw InvalidArgument("data.concatenate", fmt::format("document {} of {}", index, size()));
  }

  std::vector<std::shared_ptr<Source>> sources_;
  std::vector<std::int64_t> ends_;
  std::string name_;
};

}  // namespace

std::shared_ptr<Source> documents(std::vector<Document> documents, std::string name) {
  return std::make_shared<MemorySource>(std::move(documents), std::move(name));
}

std::shared_ptr<Source> callback_source(std::string name, std::int64_t size,
                                        std::function<Document(std::int64_t)> load) {
  if (size < 0 || !load) {
    throw InvalidArgument("data.callback_source",
                          fmt::format("{}: size {} and a function are needed", name, size));
  }
  return std::make_shared<CallbackSource>(std::move(name), size, std::move(load));
}

std::shared_ptr<Source> iterator_source(const std::string& name,
                                        const std::function<std::optional<Document>()>& next,
                                        std::int64_t max_tokens) {
  std::vector<Document> all;
  std::int64_t tokens = 0;
  while (std::optional<Document> document = next()) {
    check_mask(*document, name, all.size());
    tokens += static_cast<std::int64_t>(document->tokens.size());
    if (tokens > max_tokens) {
      throw DataError("data.iterator_source",
                      fmt::format("{}[{}]: more than max_tokens {} were read without an end", name,
                                  all.size(), max_tokens));
    }
    all.push_back(std::move(*document));
  }
  return documents(std::move(all), name);
}

std::shared_ptr<Source> concatenate(std::vector<std::shared_ptr<Source>> sources) {
  return std::make_shared<ConcatenatedSource>(std::move(sources));
}

}  // namespace meshloom::data
