#include <cstddef>

#include "packing/planner_lists.h"

namespace mmk {
namespace {

// Equal items.
struct Class {
  int64_t length, images, count;
};

// A group of equal packs: `packs` of them starting at `first`, with `items` in each.
struct Group {
  int64_t first, packs, items;
};

// How many of a class's items fit into a pack with this room.
int64_t fitting(const Class& one, Room room, int64_t samples) {
  int64_t most = std::min(one.count, samples);
  if (one.length > 0) most = std::min(most, room.tokens / one.length);
  if (one.images > 0) most = std::min(most, room.images / one.images);
  return most;
}

template <class Rooms>
class Counting {
 public:
  Counting(Caps caps, Rooms rooms) : caps_(caps), rooms_(std::move(rooms)) {}

  // Classes must be added in descending order.
  void add(Class one) {
    while (one.count > 0) {
      Room room;
      const Id id = rooms_.take({one.length, one.images}, &room);
      if (id != kNone) {
        join(id, room, &one);
        continue;
      }
      room = {caps_.tokens, caps_.images};
      const int64_t each = fitting(one, room, caps_.samples), packs = one.count / each;
      for (const Group group : {Group{0, packs, each}, Group{0, one.count % each != 0, one.count % each}}) {
        if (group.packs > 0) fill({result_.packs, group.packs, 0}, room, one, group.items);
        result_.packs += group.packs;
      }
      one.count = 0;
    }
  }

  CountedPlan take_result() { return std::move(result_); }

 private:
  // Fills a group's packs, or as many as there are items for; the rest are unchanged.
  void join(Id id, Room room, Class* one) {
    const Group group = groups_[id];
    const int64_t each = fitting(*one, room, caps_.samples - group.items);
    const int64_t full = std::min(group.packs, one->count / each);
    const int64_t rest = full < group.packs ? one->count % each : 0;
    const int64_t used = full + (rest > 0 ? 1 : 0);
    if (used < group.packs) put({group.first + used, group.packs - used, group.items}, room);
    fill({group.first, full, group.items}, room, *one, each);
    if (rest > 0) fill({group.first + full, 1, group.items}, room, *one, rest);
    one->count -= full * each + rest;
  }

  void fill(Group group, Room room, const Class& one, int64_t each) {
    result_.steps.insert(result_.steps.end(), {group.first, group.packs, each});
    group.items += each;
    put(group, {room.tokens - each * one.length, room.images - each * one.images});
  }

  void put(Group group, Room room) {
    if (group.items == caps_.samples) return;
    groups_.push_back(group);
    rooms_.put(static_cast<Id>(groups_.size() - 1), room);
  }

  Caps caps_;
  Rooms rooms_;
  std::vector<Group> groups_;
  CountedPlan result_;
};

// Calls fn(class) in descending order.
template <class F>
void each_class(Items items, F fn) {
  const std::vector<Id> order = longest_first(items);
  for (int64_t k = 0; k < items.n;) {
    Class one{items.lengths[order[k]], items.images == nullptr ? 0 : items.images[order[k]], 0};
    for (; k < items.n && items.lengths[order[k]] == one.length &&
           (items.images == nullptr || items.images[order[k]] == one.images);
         ++k)
      ++one.count;
    fn(one);
  }
}

}  // namespace

CountedPlan plan_histogram(Items items, Caps caps) {
  check_count(items.n);
  return with_rooms(items, caps, [&](auto rooms) {
    Counting<decltype(rooms)> counting(caps, std::move(rooms));
    each_class(items, [&](Class one) { counting.add(one); });
    return counting.take_result();
  });
}

CountedPlan plan_counts(const int64_t* counts, Caps caps) {
  Counting<RoomTable> counting(caps, RoomTable(caps.tokens));
  for (int64_t length = caps.tokens; length >= 0; --length)
    if (counts[length] > 0) counting.add({length, 0, counts[length]});
  return counting.take_result();
}

Plan list_histogram(Items items, const CountedPlan& counted) {
  check_count(items.n);
  const std::vector<Id> order = longest_first(items);
  std::vector<Id> pack_of(items.n);
  size_t k = 0;
  for (size_t s = 0; s < counted.steps.size(); s += 3) {
    const int64_t first = counted.steps[s], packs = counted.steps[s + 1], each = counted.steps[s + 2];
    for (int64_t pack = first; pack < first + packs; ++pack)
      for (int64_t i = 0; i < each; ++i) pack_of[order[k++]] = static_cast<Id>(pack);
  }
  return by_first_item(pack_of, static_cast<Id>(counted.packs));
}

template <class Copy>
bool count_lengths(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* counts, Copy* copy) {
  // Four tables, so that runs of equal lengths do not stall on their previous increment.
  const uint64_t limit = static_cast<uint64_t>(capacity);
  std::vector<uint32_t> tables(4 * (limit + 1), 0);
  bool good = true;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t length = static_cast<uint64_t>(lengths[i]);
    good &= length <= limit;
    copy[i] = static_cast<Copy>(length);
    ++tables[4 * std::min(length, limit) + (i & 3)];
  }
  for (uint64_t length = 0; length <= limit; ++length) {
    const uint32_t* table = tables.data() + 4 * length;
    counts[length] = int64_t{table[0]} + table[1] + table[2] + table[3];
  }
  return good;
}

template bool count_lengths(const int64_t*, int64_t, int64_t, int64_t*, uint16_t*);
template bool count_lengths(const int64_t*, int64_t, int64_t, int64_t*, int64_t*);

}  // namespace mmk
