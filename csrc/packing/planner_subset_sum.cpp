#include <optional>

#include "common/check.h"
#include "packing/planner_lists.h"
#include "packing/planner_sums.h"

namespace mmk {
namespace {

// Takes one pack after the other from the items that wait; keeps its tables from pack to pack.
class PackPicker {
 public:
  PackPicker(Items items, Caps caps, int64_t lookahead) : items_(items), caps_(caps), lookahead_(lookahead) {
    MMK_CHECK(!count_images() || caps.images < int64_t{1} << 30, "at most 2^30 images in a pack, got ", caps.images);
  }

  // waiting: item numbers, oldest first; calls taken(item) for each that joins the pack, the first among them, and
  // writes kNone in its place.
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
      if (count_images() && count_samples)
        join(&both_, waiting, take);
      else if (count_images() || count_samples)
        join(&one_, waiting, take);
      else
        join(&any_, waiting, take);
    }
    for (Id place = 1; place < static_cast<Id>(waiting->size()); ++place) {  // what takes no tokens
      const Id item = (*waiting)[place];
      if (item != kNone && items_.lengths[item] == 0 && images_of(item) <= left_.images && left_.samples > 0)
        take(place);
    }
  }

 private:
  bool count_images() const { return items_.images != nullptr && caps_.images != kNoCap; }
  int64_t images_of(Id item) const { return items_.images == nullptr ? 0 : items_.images[item]; }

  void restart(ReachableSums* sums) { sums->restart(left_.tokens); }
  void restart(CheapestSums<uint32_t>* sums) {
    sums->restart(left_.tokens, static_cast<uint32_t>(count_images() ? left_.images : left_.samples));
  }
  void restart(CheapestSums<uint64_t>* sums) {
    sums->restart(left_.tokens, static_cast<uint64_t>(left_.images) << 32 | static_cast<uint64_t>(left_.samples));
  }
  bool add(ReachableSums* sums, Id item) { return sums->add(items_.lengths[item]); }
  bool add(CheapestSums<uint32_t>* sums, Id item) {
    return sums->add(items_.lengths[item], count_images() ? static_cast<uint32_t>(images_of(item)) : 1u);
  }
  bool add(CheapestSums<uint64_t>* sums, Id item) {
    return sums->add(items_.lengths[item], static_cast<uint64_t>(images_of(item)) << 32 | 1);
  }

  template <class Sums, class F>
  void join(std::optional<Sums>* made, std::vector<Id>* waiting, F take) {
    if (!*made) made->emplace(lookahead_, caps_.tokens);
    Sums* sums = &**made;
    restart(sums);
    place_of_.assign(1, kNone);
    bool met = left_.tokens == 0;
    for (Id place = 1; !met && place < static_cast<Id>(waiting->size()); ++place) {
      const Id item = (*waiting)[place];
      const int64_t length = items_.lengths[item];
      if (length == 0 || length > left_.tokens || images_of(item) > left_.images) continue;
      place_of_.push_back(place);
      met = add(sums, item);
    }
    sums->largest([&](int64_t step) { take(place_of_[step]); });
  }

  Items items_;
  Caps caps_, left_{};
  int64_t lookahead_;
  std::optional<ReachableSums> any_;
  std::optional<CheapestSums<uint32_t>> one_;
  std::optional<CheapestSums<uint64_t>> both_;
  std::vector<Id> place_of_;  // of each step of the sums
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
