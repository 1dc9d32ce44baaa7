#include "packing/planner.h"

#include <limits>
#include <numeric>

#include "common/check.h"
#include "packing/planner_lists.h"

namespace mmk {

void check_count(int64_t n) {
  MMK_CHECK(n <= std::numeric_limits<Id>::max(), "plan_packing takes at most 2^31 - 1 items, got ", n);
}

namespace {

// Stable sort by descending keys [n], starting from 0, 1, ... if there is no order yet.
void sort_falling(const int64_t* keys, int64_t n, std::vector<Id>* order) {
  const bool fresh = order->empty();
  const int64_t largest = n > 0 ? *std::max_element(keys, keys + n) : 0;
  if (largest >= table_limit(n)) {
    if (fresh) {
      order->resize(n);
      std::iota(order->begin(), order->end(), 0);
    }
    std::stable_sort(order->begin(), order->end(), [&](Id a, Id b) { return keys[a] > keys[b]; });
    return;
  }
  std::vector<Id> start(largest + 2, 0);  // start[largest - key] after the prefix sums
  for (int64_t i = 0; i < n; ++i) ++start[largest - keys[i] + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  std::vector<Id> sorted(n);
  if (fresh) {
    for (int64_t i = 0; i < n; ++i) sorted[start[largest - keys[i]]++] = static_cast<Id>(i);
  } else {
    for (const Id i : *order) sorted[start[largest - keys[i]]++] = i;
  }
  order->swap(sorted);
}

template <class Rooms>
Plan best_fit(Items items, Caps caps, Rooms rooms) {
  const std::vector<Id> order = longest_first(items);
  const auto images_of = [&](Id i) { return items.images == nullptr ? 0 : items.images[i]; };
  std::vector<Id> pack_of(items.n);
  std::vector<int64_t> count;  // items in each pack
  for (int64_t k = 0; k < items.n;) {
    const Room item{items.lengths[order[k]], images_of(order[k])};
    Room room;
    Id pack = rooms.take(item, &room);
    if (pack == kNone) {
      pack = static_cast<Id>(count.size());
      room = {caps.tokens, caps.images};
      count.push_back(0);
    }
    // Equal items continue into the same pack: its remaining room is the least that fits.
    do {
      pack_of[order[k++]] = pack;
      room.tokens -= item.tokens;
      room.images -= item.images;
    } while (++count[pack] < caps.samples && k < items.n && room.tokens >= item.tokens && room.images >= item.images &&
             items.lengths[order[k]] == item.tokens && images_of(order[k]) == item.images);
    if (count[pack] < caps.samples) rooms.put(pack, room);
  }
  return by_first_item(pack_of, static_cast<Id>(count.size()));
}

}  // namespace

std::vector<Id> longest_first(Items items) {
  std::vector<Id> order;
  if (items.images != nullptr) sort_falling(items.images, items.n, &order);
  sort_falling(items.lengths, items.n, &order);
  return order;
}

Plan by_first_item(const std::vector<Id>& pack_of, Id num_packs) {
  const int64_t n = static_cast<int64_t>(pack_of.size());
  std::vector<Id> number(num_packs, kNone);
  Plan plan{std::vector<int64_t>(num_packs + 1, 0), std::vector<int64_t>(n)};
  Id seen = 0;
  for (const Id pack : pack_of) {
    if (number[pack] == kNone) number[pack] = seen++;
    ++plan.offsets[number[pack] + 1];
  }
  std::partial_sum(plan.offsets.begin(), plan.offsets.end(), plan.offsets.begin());
  std::vector<int64_t> end(plan.offsets.begin(), plan.offsets.end() - 1);
  for (int64_t i = 0; i < n; ++i) plan.items[end[number[pack_of[i]]]++] = i;
  return plan;
}

Plan plan_best_fit(Items items, Caps caps) {
  check_count(items.n);
  return with_rooms(items, caps, [&](auto rooms) { return best_fit(items, caps, std::move(rooms)); });
}

Plan plan_next_fit(Items items, Caps caps) {
  check_count(items.n);
  std::vector<Id> pack_of(items.n);
  Id packs = 0;
  int64_t count = 0;
  Room room{0, 0};
  for (int64_t i = 0; i < items.n; ++i) {
    const Room item{items.lengths[i], items.images == nullptr ? 0 : items.images[i]};
    if (packs == 0 || item.tokens > room.tokens || item.images > room.images || count == caps.samples) {
      ++packs;
      room = {caps.tokens, caps.images};
      count = 0;
    }
    room.tokens -= item.tokens;
    room.images -= item.images;
    ++count;
    pack_of[i] = packs - 1;
  }
  return by_first_item(pack_of, packs);
}

}  // namespace mmk
