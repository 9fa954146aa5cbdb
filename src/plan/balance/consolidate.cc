#include "plan/balance/consolidate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "meshloom/core/random.h"

namespace meshloom::plan::balance {
namespace {

/// Part of a rank's capacity that bins of short samples can be trusted to fill.
constexpr double kFilled = 0.985;
/// What ends one per cent of the target later is exp of this part of it dearer.
constexpr double kSteep = 200.0;
/// Rounds of emptying bins and levelling ends, and with many boxes.
constexpr int kRounds = 6;
constexpr int kFewRounds = 1;
constexpr std::size_t kManyBoxes = 512;
/// Moves and swaps tried in a round: for every item, and at most.
constexpr std::uint64_t kTriesOfItem = 20;
constexpr std::uint64_t kMostTries = 30'000;
/// Boxes that the items of an emptied bin are offered to.
constexpr std::size_t kOffers = 48;
/// A price must fall by this part to count as lower: rounding is no progress.
constexpr double kProgress = 1e-12;

/// The items of one gap. Its bins count as ceil(tokens / what a bin can be trusted to hold).
struct Box {
  double space = 0.0;  ///< time from its begin to the target
  double work = 0.0;
  std::int64_t tokens = 0;
  int halves = 0;      ///< items longer than half a bin: no two share one
  bool inner = false;  ///< must not end beyond its space
};

class Consolidation {
 public:
  Consolidation(const Model& model, std::span<Gap> gaps, std::size_t inner, double target)
      : model_(model), gaps_(gaps), target_(target) {
    full_ = std::max(1.0, kFilled * static_cast<double>(model.capacity));
    boxes_.resize(gaps.size());
    for (std::size_t g = 0; g < gaps.size(); ++g) {
      Box& box = boxes_[g];
      box.inner = g < inner;
      box.space = gaps[g].space;
      for (const int item : gaps[g].items) {
        entries_.push_back({item, g});
        add_(box, item_of(entries_.back()), 1);
      }
    }
  }

  void run() {
    if (entries_.empty() || boxes_.size() < 2) return;
    for (const Box& box : boxes_) prices_.push_back(price(box));
    const int rounds = boxes_.size() < kManyBoxes ? kRounds : kFewRounds;
    for (int round = 0; round < rounds; ++round) {
      const bool emptied = empty_bins();
      level();
      if (!emptied && round > 0) break;
    }
    for (Gap& gap : gaps_) gap.items.clear();
    for (const Entry& entry : entries_) gaps_[entry.box].items.push_back(entry.item);
    for (Gap& gap : gaps_) std::sort(gap.items.begin(), gap.items.end());  // largest first
  }

 private:
  struct Entry {
    int item = 0;
    std::size_t box = 0;
  };

  [[nodiscard]] const Item& item_of(const Entry& entry) const {
    return model_.items[static_cast<std::size_t>(entry.item)];
  }
  [[nodiscard]] double bins(const Box& box) const {
    return std::max<double>(std::ceil(static_cast<double>(box.tokens) / full_), box.halves);
  }
  [[nodiscard]] double room(const Box& box) const {
    return bins(box) * full_ - static_cast<double>(box.tokens);
  }
  /// How far the box ends beyond its space.
  [[nodiscard]] double late(const Box& box) const {
    return box.work + model_.cost.fixed * bins(box) - box.space;
  }
  /// Grows steeply with the time at which the box ends, if it is a rank's last. The sum of prices
  /// falls with every bin saved and with every two ends made level, most where it is latest.
  [[nodiscard]] double price(const Box& box) const {
    const double end = late(box);
    if (box.inner) return end > 0.0 ? std::numeric_limits<double>::infinity() : 0.0;
    return std::exp(kSteep * end / target_);
  }
  void add_(Box& box, const Item& item, int times) const {
    box.work += times * item.work;
    box.tokens += times * item.tokens;
    if (2 * item.tokens > model_.capacity) box.halves += times;
  }
  std::size_t random_(std::size_t below) {
    return static_cast<std::size_t>(random_bits(2, counter_++) % below);
  }

  void level() {
    const std::uint64_t tries = std::min<std::uint64_t>(kMostTries, kTriesOfItem * entries_.size());
    for (std::uint64_t i = 0; i < tries; ++i) {
      Entry& one = entries_[random_(entries_.size())];
      const bool swap = i % 2 == 0;
      Entry* other = swap ? &entries_[random_(entries_.size())] : nullptr;
      const std::size_t to = swap ? other->box : random_(boxes_.size());
      if (to == one.box) continue;
      Box from_box = boxes_[one.box];
      Box to_box = boxes_[to];
      const double before = prices_[one.box] + prices_[to];
      add_(from_box, item_of(one), -1);
      add_(to_box, item_of(one), 1);
      if (swap) {
        add_(from_box, item_of(*other), 1);
        add_(to_box, item_of(*other), -1);
      }
      const double from_price = price(from_box);
      const double to_price = price(to_box);
      if (from_price + to_price >= before * (1.0 - kProgress)) continue;
      boxes_[one.box] = from_box;
      boxes_[to] = to_box;
      prices_[one.box] = from_price;
      prices_[to] = to_price;
      if (swap) other->box = one.box;
      one.box = to;
    }
  }

  /// Empties the last bin of boxes where little is in it, into the room of others.
  bool empty_bins() {
    std::vector<std::vector<std::size_t>> held(boxes_.size());  // entries, largest first
    for (std::size_t e = 0; e < entries_.size(); ++e) held[entries_[e].box].push_back(e);
    std::vector<std::pair<double, std::size_t>> order;
    for (std::size_t b = 0; b < boxes_.size(); ++b) {
      const double last = full_ - room(boxes_[b]);
      if (!held[b].empty()) order.emplace_back(last, b);
    }
    std::sort(order.begin(), order.end());
    bool any = false;
    for (const auto& [last, from] : order) any |= empty_bin(from, last, held[from]);
    return any;
  }

  bool empty_bin(std::size_t from, double last, const std::vector<std::size_t>& held) {
    std::vector<std::size_t> moved;
    double tokens = 0.0;
    for (auto e = held.rbegin(); e != held.rend() && tokens < last; ++e) {
      if (entries_[*e].box != from) continue;  // moved here or away since
      moved.push_back(*e);
      tokens += static_cast<double>(item_of(entries_[*e]).tokens);
      // One that is enough alone makes the smaller ones before it needless.
      if (static_cast<double>(item_of(entries_[*e]).tokens) >= last) moved.assign(1, *e);
    }
    if (tokens < last) return false;
    std::vector<std::pair<std::size_t, Box>> undo;
    double gain = 0.0;
    const auto keep = [&](std::size_t b) { undo.emplace_back(b, boxes_[b]); };
    std::vector<std::size_t> where;
    std::reverse(moved.begin(), moved.end());
    for (const std::size_t e : moved) {
      const Item& item = item_of(entries_[e]);
      // The bin is there already, so the price grows least where the box ends earliest.
      std::size_t best = boxes_.size();
      double earliest = std::numeric_limits<double>::infinity();
      const std::size_t first = boxes_.size() > kOffers ? random_(boxes_.size()) : 0;
      for (std::size_t i = 0; i < std::min(kOffers, boxes_.size()); ++i) {
        const std::size_t b = (first + i) % boxes_.size();
        const Box& box = boxes_[b];
        if (b == from || room(box) < static_cast<double>(item.tokens)) continue;
        double end = late(box) + item.work;
        if (box.inner) {
          if (end > 0.0) continue;
          end = -std::numeric_limits<double>::infinity();  // free
        }
        if (end >= earliest && best < boxes_.size()) continue;
        earliest = end;
        best = b;
      }
      if (best == boxes_.size()) break;
      keep(best);
      add_(boxes_[best], item, 1);
      const double before = std::exchange(prices_[best], price(boxes_[best]));
      gain += before - prices_[best];
      where.push_back(best);
    }
    if (where.size() == moved.size()) {
      Box without = boxes_[from];
      for (const std::size_t e : moved) add_(without, item_of(entries_[e]), -1);
      gain += prices_[from] - price(without);
      if (gain > 0.0) {
        boxes_[from] = without;
        prices_[from] = price(without);
        for (std::size_t i = 0; i < moved.size(); ++i) entries_[moved[i]].box = where[i];
        return true;
      }
    }
    for (auto u = undo.rbegin(); u != undo.rend(); ++u) {
      boxes_[u->first] = u->second;
      prices_[u->first] = price(u->second);
    }
    return false;
  }

  const Model& model_;
  std::span<Gap> gaps_;
  double target_;
  double full_ = 1.0;
  std::vector<Box> boxes_;
  std::vector<double> prices_;  // of boxes
  std::vector<Entry> entries_;
  std::uint64_t counter_ = 0;
};

}  // namespace

void consolidate_(const Model& model, std::span<Gap> gaps, std::size_t inner, double target) {
  if (model.cost.fixed > 0.0) Consolidation(model, gaps, inner, target).run();
}

}  // namespace meshloom::plan::balance
