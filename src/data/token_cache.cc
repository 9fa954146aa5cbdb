#include "meshloom/data/token_cache.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <system_error>
#include <unordered_map>
#include <utility>
#include <vector>

#include "data/internal/hash.h"
#include "meshloom/core/error.h"

namespace meshloom::data {
namespace detail {

constexpr std::uint64_t kRecordMagic = 0x315345524B54'4C4DULL;  // "MLTKRES1"
constexpr std::uint64_t kLongestRecord = 1ULL << 40;            // tokens; more is damage

using RecordKey = std::array<char, 32>;  // hash of the caller's key, hexadecimal

struct RecordKeyHash {
  std::size_t operator()(const RecordKey& key) const { return hash64({key.data(), key.size()}); }
};

// In front of every document in a segment, then int32 tokens, then the mask if there is one.
struct RecordHeader {
  std::uint64_t magic = kRecordMagic;
  RecordKey key{};
  std::uint64_t tokens = 0;
  std::uint64_t mask_bytes = 0;
  std::uint64_t payload_hash = 0;
  std::uint64_t header_hash = 0;  ///< of all fields above

  [[nodiscard]] std::uint64_t own_hash() const {
    return hash64({reinterpret_cast<const char*>(this), offsetof(RecordHeader, header_hash)});
  }
  [[nodiscard]] std::uint64_t payload_bytes() const {
    return tokens * sizeof(std::int32_t) + mask_bytes;
  }
  [[nodiscard]] bool valid() const {
    return magic == kRecordMagic && header_hash == own_hash() && tokens < kLongestRecord &&
           (mask_bytes == 0 || mask_bytes == tokens);
  }
};
static_assert(sizeof(RecordHeader) == 72, "the record header has no padding");

}  // namespace detail

namespace {

constexpr const char* kSegmentSuffix = ".tokens";

detail::RecordKey hashed(const std::string& key) {
  const std::string text = detail::hash128_hex(key);
  detail::RecordKey result;
  std::copy(text.begin(), text.end(), result.begin());
  return result;
}

// True when all bytes were read.
bool read_exactly(int descriptor, void* into, std::size_t bytes, std::uint64_t offset) {
  auto* at = static_cast<char*>(into);
  while (bytes > 0) {
    const ssize_t got = ::pread(descriptor, at, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::size_t>(got);
  }
  return true;
}

}  // namespace

class TokenCache::Impl {
 public:
  explicit Impl(const std::string& folder) : folder_(folder) {
    std::error_code error;
    std::filesystem::create_directories(folder_, error);
    if (error || !std::filesystem::is_directory(folder_, error)) {
      throw IoError("data.token_cache",
                    fmt::format("{}: {}", folder_, error ? error.message() : "not a folder"));
    }
    if (!scan()) {
      throw IoError("data.token_cache", fmt::format("{}: {}", folder_, std::strerror(errno)));
    }
  }

  ~Impl() {
    for (auto& [name, segment] : segments_) ::close(segment.descriptor);
    if (own_ >= 0) ::close(own_);
  }

  std::optional<Document> find(const std::string& key) {
    const std::lock_guard lock(mutex_);
    const detail::RecordKey wanted = hashed(key);
    auto found = index_.find(wanted);
    if (found == index_.end()) {
      (void)scan();
      found = index_.find(wanted);
    }
    if (found != index_.end()) {
      if (auto document = read(found->second)) {
        ++statistics_.hits;
        return document;
      }
      ++statistics_.damaged;
      index_.erase(found);
    }
    ++statistics_.misses;
    return std::nullopt;
  }

  void add(const std::string& key, const Document& document) {
    const std::lock_guard lock(mutex_);
    if (!statistics_.write_error.empty() || !open_own()) return;
    detail::RecordHeader header;
    header.key = hashed(key);
    header.tokens = document.tokens.size();
    header.mask_bytes = document.loss_mask.size();
    std::string record(sizeof(header), '\0');
    record.append(reinterpret_cast<const char*>(document.tokens.data()),
                  document.tokens.size() * sizeof(std::int32_t));
    record.append(reinterpret_cast<const char*>(document.loss_mask.data()),
                  document.loss_mask.size());
    header.payload_hash = detail::hash64(std::string_view(record).substr(sizeof(header)));
    header.header_hash = header.own_hash();
    std::memcpy(record.data(), &header, sizeof(header));
    std::size_t written = 0;
    while (written < record.size()) {
      const ssize_t wrote = ::write(own_, record.data() + written, record.size() - written);
      if (wrote < 0 && errno == EINTR) continue;
      if (wrote <= 0) {
        stop_writing(wrote < 0 ? errno : ENOSPC);
        return;
      }
      written += static_cast<std::size_t>(wrote);
    }
    own_end_ += record.size();
    ++statistics_.added;
    scan_segment(segments_.at(own_name_));
  }

  Statistics statistics() const {
    const std::lock_guard lock(mutex_);
    return statistics_;
  }

 private:
  struct Segment {
    int descriptor = -1;
    std::uint64_t scanned = 0;  ///< bytes behind the last whole record
    bool damaged = false;       ///< nothing behind `scanned` can be found
  };
  struct Place {
    int descriptor = -1;
    std::uint64_t offset = 0;
    detail::RecordHeader header;
  };

  std::optional<Document> read(const Place& place) const {
    std::string payload(place.header.payload_bytes(), '\0');
    if (!read_exactly(place.descriptor, payload.data(), payload.size(),
                      place.offset + sizeof(detail::RecordHeader)) ||
        detail::hash64(payload) != place.header.payload_hash) {
      return std::nullopt;
    }
    Document document;
    document.tokens.resize(place.header.tokens);
    document.loss_mask.resize(place.header.mask_bytes);
    const std::size_t token_bytes = document.tokens.size() * sizeof(std::int32_t);
    if (token_bytes > 0) std::memcpy(document.tokens.data(), payload.data(), token_bytes);
    std::copy(payload.begin() + static_cast<std::ptrdiff_t>(token_bytes), payload.end(),
              document.loss_mask.begin());
    return document;
  }

  // Reads the headers of records added since the last scan. A record that is not whole yet stays
  // for the next scan.
  void scan_segment(Segment& segment) {
    if (segment.damaged) return;
    const off_t end = ::lseek(segment.descriptor, 0, SEEK_END);
    if (end < 0) return;
    const auto bytes = static_cast<std::uint64_t>(end);
    while (segment.scanned + sizeof(detail::RecordHeader) <= bytes) {
      detail::RecordHeader header;
      if (!read_exactly(segment.descriptor, &header, sizeof(header), segment.scanned)) return;
      if (!header.valid()) {
        segment.damaged = true;
        ++statistics_.damaged;
        return;
      }
      const std::uint64_t next = segment.scanned + sizeof(header) + header.payload_bytes();
      if (next > bytes) return;
      index_[header.key] = {segment.descriptor, segment.scanned, header};
      segment.scanned = next;
    }
  }

  // New segments of the folder, and new records of all. False where the folder is gone.
  bool scan() {
    DIR* directory = ::opendir(folder_.c_str());
    if (directory == nullptr) return false;
    while (const dirent* entry = ::readdir(directory)) {
      const std::string name = entry->d_name;
      if (!name.ends_with(kSegmentSuffix) || segments_.contains(name)) continue;
      const int descriptor =
          ::open((std::filesystem::path(folder_) / name).c_str(), O_RDONLY | O_CLOEXEC);
      if (descriptor >= 0) segments_[name].descriptor = descriptor;
    }
    ::closedir(directory);
    for (auto& [name, segment] : segments_) scan_segment(segment);
    return true;
  }

  bool open_own() {
    if (own_ >= 0) return true;
    // Unique by process, object and time: a process id alone comes back.
    own_name_ =
        fmt::format("{}-{:x}-{:x}{}", ::getpid(), reinterpret_cast<std::uintptr_t>(this),
                    std::chrono::system_clock::now().time_since_epoch().count(), kSegmentSuffix);
    const std::string path = (std::filesystem::path(folder_) / own_name_).string();
    own_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0644);
    const int reading = own_ < 0 ? -1 : ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (reading < 0) {
      stop_writing(errno);
      return false;
    }
    segments_[own_name_].descriptor = reading;
    return true;
  }

  // Leaves only whole records behind.
  void stop_writing(int reason) {
    statistics_.write_error = fmt::format("{}: {}", folder_, std::strerror(reason));
    if (own_ < 0) return;
    if (::ftruncate(own_, static_cast<off_t>(own_end_)) != 0) {
      statistics_.write_error += ", and the torn record could not be cut off";
    }
    ::close(own_);
    own_ = -1;
  }

  std::string folder_;
  mutable std::mutex mutex_;
  std::map<std::string, Segment> segments_;
  std::unordered_map<detail::RecordKey, Place, detail::RecordKeyHash> index_;
  int own_ = -1;
  std::string own_name_;
  std::uint64_t own_end_ = 0;
  Statistics statistics_;
};

TokenCache::TokenCache(const std::string& folder) : impl_(std::make_unique<Impl>(folder)) {}

TokenCache::~TokenCache() = default;

std::optional<Document> TokenCache::find(const std::string& key) { return impl_->find(key); }

void TokenCache::add(const std::string& key, const Document& document) {
  impl_->add(key, document);
}

TokenCache::Statistics TokenCache::statistics() const { return impl_->statistics(); }

namespace {

class CachedSource final : public Source {
 public:
  CachedSource(std::shared_ptr<Source> source, std::shared_ptr<TokenCache> cache)
      : source_(std::move(source)), cache_(std::move(cache)) {}

  const std::string& name() const override { return source_->name(); }
  std::int64_t size() const override { return source_->size(); }
  std::string describe(std::int64_t index) const override { return source_->describe(index); }
  std::uint64_t order_key(std::int64_t index) const override { return source_->order_key(index); }
  std::string cache_key(std::int64_t) const override { return {}; }  // cached already
  std::string fingerprint() const override { return source_->fingerprint(); }

  Document load(std::int64_t index) const override {
    const std::string key = source_->cache_key(index);
    if (key.empty()) return source_->load(index);
    if (auto known = cache_->find(key)) return *std::move(known);
    Document document = source_->load(index);
    cache_->add(key, document);
    return document;
  }

 private:
  std::shared_ptr<Source> source_;
  std::shared_ptr<TokenCache> cache_;
};

}  // namespace

std::shared_ptr<Source> cached(std::shared_ptr<Source> source, std::shared_ptr<TokenCache> cache) {
  if (source == nullptr || cache == nullptr) {
    throw InvalidArgument("data.cached", "a source and a cache are needed");
  }
  return std::make_shared<CachedSource>(std::move(source), std::move(cache));
}

}  // namespace meshloom::data
