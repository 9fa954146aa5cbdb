#include "meshloom/parallel/activation_offload.h"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <span>
#include <vector>

#include "meshloom/core/check.h"
#include "parallel/internal/host_tier.h"

namespace meshloom::parallel {

using detail::HostedTensor;
using detail::HostTier;
using HostedPtr = std::shared_ptr<HostedTensor>;

void check_offload(const plan::StepPlan& plan, std::int64_t layers) {
  if (plan.memory.layers == layers) return;
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    for (std::size_t u = 0; u < plan.slots[s].units.size(); ++u) {
      if (plan.slots[s].units[u].offload <= 0.0) continue;
      throw PlanError(
          "parallel.offload",
          fmt::format("slot {}, unit {} offloads {} of its activations by a memory "
                      "model of {} layers; the model has {}",
                      s, u, plan.slots[s].units[u].offload, plan.memory.layers, layers));
    }
  }
}

class ActivationOffload::Impl {
 public:
  explicit Impl(std::string folder) : folder_(std::move(folder)) {}

  void begin_step(const MemoryModel& memory, std::int64_t layers) {
    movable_ = layers - memory.resident_layers;
    ahead_ = static_cast<std::size_t>(std::max(1, memory.resident_layers - 1));
    upcoming = nullptr;
    on_the_way_.clear();
    held_ = 0;
    saved_bytes_ = 0;
    peak_bytes_ = 0;
    if (tier_) tier_->reset();
  }

  void set_spans(SpanSink spans) {
    spans_ = std::move(spans);
    if (tier_) tier_->set_spans(spans_);
  }

  [[nodiscard]] bool moves(std::int64_t layer) const { return layer < movable_; }
  [[nodiscard]] std::size_t ahead() const { return ahead_; }

  [[nodiscard]] HostedPtr leave(at::Tensor& tensor, double ratio) {
    if (!tier_) {
      tier_ = tensor.is_cpu() ? detail::make_spill_tier(folder_)
                              : detail::make_stream_tier(tensor.device());
      tier_->set_spans(spans_);
    }
    return tier_->leave(tensor, ratio);
  }

  /// A layer's forward has ended, and these are on their way; waits for those of layers that lie
  /// farther back than may be whole.
  void layer_left(std::vector<std::weak_ptr<HostedTensor>> leaving) {
    on_the_way_.push_back(std::move(leaving));
    for (; on_the_way_.size() > ahead_; on_the_way_.pop_front()) {
      for (const auto& hosted : on_the_way_.front()) {
        if (const HostedPtr there = hosted.lock()) tier_->settle(*there);
      }
    }
  }

  void fetch(HostedTensor& hosted) { tier_->fetch(hosted); }
  [[nodiscard]] at::Tensor take(HostedTensor& hosted) { return tier_->take(hosted); }
  void fetch_upcoming();

  void save(std::int64_t bytes) { saved_bytes_ += bytes; }
  /// More bytes are in stores, or fewer.
  void hold(std::int64_t bytes) {
    held_ += bytes;
    sample();
  }
  void sample() { peak_bytes_ = std::max(peak_bytes_, held_ - (tier_ ? tier_->away_bytes() : 0)); }

  [[nodiscard]] OffloadOutcome outcome() const {
    OffloadOutcome result = tier_ ? tier_->totals() : OffloadOutcome();
    result.saved_bytes = saved_bytes_;
    result.peak_bytes = peak_bytes_;
    return result;
  }

  Store* upcoming = nullptr;

 private:
  std::string folder_;
  SpanSink spans_;
  std::unique_ptr<HostTier> tier_;
  std::int64_t movable_ = 0;  ///< layers before this one move
  std::size_t ahead_ = 1;     ///< layers that may be on their way
  std::deque<std::vector<std::weak_ptr<HostedTensor>>> on_the_way_;  ///< out, by layer
  std::int64_t held_ = 0;  ///< by all stores, as if nothing were away
  std::int64_t saved_bytes_ = 0;
  std::int64_t peak_bytes_ = 0;
};

class ActivationOffload::Store final : public model::ActivationStore {
 public:
  Store(Impl& owner, double ratio, std::pair<std::int64_t, std::int64_t> layers)
      : owner_(owner), ratio_(ratio), last_layer_(layers.second - 1) {}

  ~Store() override {
    for (const Entry& entry : entries_) owner_.hold(-entry.bytes);
    if (owner_.upcoming == this) owner_.upcoming = nullptr;
  }

  void push(model::Activation kind, at::Tensor tensor) override {
    const std::int64_t bytes =
        tensor.defined() ? static_cast<std::int64_t>(tensor.nbytes()) : std::int64_t{0};
    const void* identity = tensor.unsafeGetTensorImpl();
    entries_.push_back({kind, std::move(tensor), identity, bytes, nullptr});
    owner_.hold(bytes);
  }

  void layer_done(std::int64_t layer) override {
    const std::span<Entry> own = std::span(entries_).subspan(begin_of(ends_.size()));
    std::vector<std::weak_ptr<HostedTensor>> leaving;
    for (Entry& entry : own) {
      if (entry.bytes == 0) continue;
      // What several entries share is held, and moved, once.
      Entry& first = *std::find_if(own.begin(), own.end(), [&](const Entry& other) {
        return other.identity == entry.identity;
      });
      if (&first != &entry) {
        owner_.hold(-std::exchange(entry.bytes, 0));
        entry.hosted = first.hosted;
        if (entry.hosted) entry.tensor.reset();
        continue;
      }
      owner_.save(entry.bytes);
      if (ratio_ <= 0.0 || !owner_.moves(layer) || !entry.tensor.is_contiguous()) continue;
      entry.hosted = owner_.leave(entry.tensor, ratio_);
      if (entry.hosted) leaving.push_back(entry.hosted);
    }
    ends_.push_back(entries_.size());
    not_fetched_ = ends_.size();
    owner_.layer_left(std::move(leaving));
    if (layer + 1 >= last_layer_) owner_.fetch_upcoming();
  }

  at::Tensor pop(model::Activation kind) override {
    MESHLOOM_CHECK(!entries_.empty(), "parallel.offload", "pop from an empty store");
    MESHLOOM_CHECK_EQ(static_cast<int>(entries_.back().kind), static_cast<int>(kind),
                      "parallel.offload", "kind of the activation on top");
    if (!ends_.empty()) reach(ends_.size() - (entries_.size() > ends_.back() ? 0 : 1));
    Entry entry = std::move(entries_.back());
    entries_.pop_back();
    while (!ends_.empty() && begin_of(ends_.size() - 1) >= entries_.size()) ends_.pop_back();
    at::Tensor tensor = entry.hosted ? owner_.take(*entry.hosted) : std::move(entry.tensor);
    owner_.hold(-entry.bytes);
    return tensor;
  }

  std::int64_t bytes() const override {
    std::int64_t total = 0;
    for (const Entry& entry : entries_) {
      total += entry.bytes;
      if (entry.hosted && entry.bytes > 0) total -= entry.hosted->away_bytes();
    }
    return total;
  }

  /// Backward of this store comes next.
  void fetch_last() { reach(ends_.size()); }

 private:
  struct Entry {
    model::Activation kind;
    at::Tensor tensor;     ///< undefined where there is a tensor
    const void* identity;  ///< of the tensor, while its layer runs
    std::int64_t bytes;    ///< 0 where another entry of the layer counts them
    HostedPtr hosted;
  };

  /// Index of the first entry of the n-th layer here.
  [[nodiscard]] std::size_t begin_of(std::size_t n) const { return n == 0 ? 0 : ends_[n - 1]; }

  /// Backward comes to the n-th layer here, or is about to begin: those below it are fetched as far
  /// ahead as layers may be whole.
  void reach(std::size_t n) {
    while (not_fetched_ > 0 && not_fetched_ + owner_.ahead() > n) {
      --not_fetched_;
      for (std::size_t i = begin_of(not_fetched_); i < ends_[not_fetched_]; ++i) {
        if (entries_[i].hosted) owner_.fetch(*entries_[i].hosted);
      }
    }
    owner_.sample();
    if (n == 0) owner_.fetch_upcoming();
  }

  Impl& owner_;
  double ratio_;
  std::int64_t last_layer_;
  std::vector<Entry> entries_;
  std::vector<std::size_t> ends_;  ///< of the layers' entries
  std::size_t not_fetched_ = 0;    ///< layers here
};

void ActivationOffload::Impl::fetch_upcoming() {
  if (upcoming != nullptr) std::exchange(upcoming, nullptr)->fetch_last();
}

ActivationOffload::ActivationOffload(std::string spill_folder)
    : impl_(std::make_unique<Impl>(std::move(spill_folder))) {}

ActivationOffload::~ActivationOffload() = default;

void ActivationOffload::begin_step(const MemoryModel& memory, std::int64_t layers) {
  impl_->begin_step(memory, layers);
}

void ActivationOffload::set_spans(SpanSink spans) { impl_->set_spans(std::move(spans)); }

std::unique_ptr<model::ActivationStore> ActivationOffload::make_store(
    double ratio, std::pair<std::int64_t, std::int64_t> layers) {
  return std::make_unique<Store>(*impl_, ratio, layers);
}

void ActivationOffload::set_upcoming(model::ActivationStore* store) {
  impl_->upcoming = static_cast<Store*>(store);
}

OffloadOutcome ActivationOffload::outcome() const { return impl_->outcome(); }

}  // namespace meshloom::parallel
