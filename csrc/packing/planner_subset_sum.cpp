#include <optional>

#include "common/check.h"
#include "packing/planner_lists.h"
#include "packing/planner_sums.h"

namespace mmk {
namespace {

// Takes pack after pack from the waiting items, reusing its tables.
class PackPicker {
 public:
  PackPicker(Items items, Caps caps, int64_t lookahead) : items_(items), caps_(caps), lookahead_(lookahead) {
    MMK_CHECK(!count_images() || caps.images < int64_t{1} << 30, "at most 2^30 images in a pack, got ", caps.images);
  }

  // waiting: item numbers, oldest first. Calls taken(item) for each item of the pack, including the first, and
  // overwrites it with kNone.
  template <class F>
  void pick(std::vector<Id>* waiting, F taken) {
    left_ = caps_;
    const auto take = [&](Id place) {
      const Id item = (*waiting)[place];
      left_.tokens -= items_.lengths[item];
      if (left_.images != kNoCap) left_.images -= images_of(item);
      if (left_.samples != kNoCap) --left_.samples;
      (*waiting)[place] = kNone;
      taken(item);
    };
    take(0);
    const bool count_samples = caps_.samples < static_cast<int64_t>(waiting->size());
    if (left_.samples > 0) {
      chosen_.clear();
      if (!count_images() && !count_samples) {
        if (!any_) any_.emplace(lookahead_, caps_.tokens);
        any_->restart(left_.tokens);
        join(*waiting, [&](Id item) { return any_->add(items_.lengths[item]); });
        any_->largest([&](int64_t step) { chosen_.push_back(place_of_[step]); });
      } else {
        int64_t fullest = 0;
        if (count_images()) fullest = join_within(*waiting, left_.images, [&](Id item) { return images_of(item); });
        if (count_samples && fullest < left_.tokens) {
          const std::vector<Id> by_images = std::move(chosen_);
          const int64_t sum = join_within(*waiting, left_.samples, [](Id) { return int64_t{1}; });
          if (count_images() && sum <= fullest) chosen_ = by_images;
        }
      }
      for (const Id place : chosen_) take(place);
    }
    for (Id place = 1; place < static_cast<Id>(waiting->size()); ++place) {  // items without tokens
      const Id item = (*waiting)[place];
      if (item != kNone && items_.lengths[item] == 0 && images_of(item) <= left_.images && left_.samples > 0)
        take(place);
    }
  }

 private:
  bool count_images() const { return items_.images != nullptr && caps_.images != kNoCap; }
  int64_t images_of(Id item) const { return items_.images == nullptr ? 0 : items_.images[item]; }

  // Adds the items that fit, oldest first, until add(item) returns that the capacity is met.
  template <class Add>
  void join(const std::vector<Id>& waiting, Add add) {
    place_of_.assign(1, kNone);
    bool met = left_.tokens == 0;
    for (Id place = 1; !met && place < static_cast<Id>(waiting.size()); ++place) {
      const Id item = waiting[place];
      const int64_t length = items_.lengths[item];
      if (length == 0 || length > left_.tokens || images_of(item) > left_.images) continue;
      place_of_.push_back(place);
      met = add(item);
    }
  }

  // Chooses items that cost at most `most` and satisfy the other cap; returns their sum.
  template <class CostOf>
  int64_t join_within(const std::vector<Id>& waiting, int64_t most, CostOf cost_of) {
    if (!within_) within_.emplace(lookahead_, caps_.tokens);
    within_->restart(left_.tokens, most);
    join(waiting, [&](Id item) { return within_->add(items_.lengths[item], cost_of(item)); });
    const int64_t sum = within_->largest(&steps_, [&] {
      int64_t images = 0;
      for (const int64_t step : steps_) images += images_of(waiting[place_of_[step]]);
      return images <= left_.images && static_cast<int64_t>(steps_.size()) <= left_.samples;
    });
    chosen_.clear();
    for (const int64_t step : steps_) chosen_.push_back(place_of_[step]);
    return sum;
  }

  Items items_;
  Caps caps_, left_{};
  int64_t lookahead_;
  std::optional<ReachableSums> any_;
  std::optional<CheapestSums> within_;
  std::vector<Id> place_of_;    // position of each step's item
  std::vector<int64_t> steps_;  // steps of the subset under consideration
  std::vector<Id> chosen_;      // places
};

void check_capacity(Caps caps) {
  MMK_CHECK(caps.tokens <= kMostSubsetSum, "subset sum takes a capacity of at most 2^24, got ", caps.tokens);
}

}  // namespace

Plan plan_subset_sum(Items items, Caps caps, int64_t lookahead) {
  check_count(items.n);
  check_capacity(caps);
  lookahead = std::min(lookahead, items.n);
  std::vector<Id> pack_of(items.n), waiting;
  PackPicker picker(items, caps, lookahead);
  Id packs = 0;
  for (int64_t cursor = 0; cursor < items.n || !waiting.empty(); ++packs) {
    while (cursor < items.n && static_cast<int64_t>(waiting.size()) < lookahead)
      waiting.push_back(static_cast<Id>(cursor++));
    picker.pick(&waiting, [&](Id item) { pack_of[item] = packs; });
    waiting.erase(std::remove(waiting.begin(), waiting.end(), kNone), waiting.end());
  }
  return by_first_item(pack_of, packs);
}

std::vector<int64_t> fullest_pack(Items waiting, Caps caps) {
  check_count(waiting.n);
  check_capacity(caps);
  std::vector<Id> places(waiting.n);
  for (int64_t i = 0; i < waiting.n; ++i) places[i] = static_cast<Id>(i);
  std::vector<int64_t> taken;
  if (waiting.n == 0) return taken;
  PackPicker(waiting, caps, waiting.n).pick(&places, [&](Id item) { taken.push_back(item); });
  std::sort(taken.begin(), taken.end());
  return taken;
}

}  // namespace mmk
