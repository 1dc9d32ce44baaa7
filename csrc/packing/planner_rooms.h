// Open packs by remaining room, for best fit: a table, a tree for capacities too large for a table, and both with room
// for images. A "pack" may stand for a group of equal packs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "packing/planner.h"

namespace mmk {

// Pack and item numbers inside the planner; half the memory traffic of int64.
using Id = int32_t;
constexpr Id kNone = -1;

struct Room {
  int64_t tokens, images;
};

// Maximum size of tables indexed by length or room; above it, sorting and a tree are used.
inline int64_t table_limit(int64_t n) { return std::max<int64_t>(int64_t{1} << 20, 8 * n); }

// A set of small integers: 64-ary bitmaps; a bit of a level tells whether a word of the level below is nonzero.
class BitSet {
 public:
  explicit BitSet(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void insert(int64_t value) {
    for (auto& level : levels_) {
      uint64_t& word = level[value >> 6];
      const bool was_empty = word == 0;
      word |= uint64_t{1} << (value & 63);
      if (!was_empty) return;
      value >>= 6;
    }
  }

  void erase(int64_t value) {
    for (auto& level : levels_) {
      uint64_t& word = level[value >> 6];
      word &= ~(uint64_t{1} << (value & 63));
      if (word != 0) return;
      value >>= 6;
    }
  }

  // The smallest member >= value, or -1.
  int64_t at_least(int64_t value) const {
    for (size_t up = 0; up < levels_.size(); ++up) {
      const auto& level = levels_[up];
      if ((value >> 6) >= static_cast<int64_t>(level.size())) return -1;
      const uint64_t word = level[value >> 6] >> (value & 63);
      if (word != 0) {
        value += __builtin_ctzll(word);
        while (up-- > 0) value = (value << 6) + __builtin_ctzll(levels_[up][value]);
        return value;
      }
      value = (value >> 6) + 1;
    }
    return -1;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

// A table of LIFO linked lists by room, and the set of non-empty rooms.
class RoomTable {
 public:
  explicit RoomTable(int64_t capacity) : rooms_(capacity + 1), head_(capacity + 1, kNone) {}

  void put(Id pack, Room room) {
    if (static_cast<size_t>(pack) >= next_.size()) next_.resize(pack + 1);
    if (head_[room.tokens] == kNone) rooms_.insert(room.tokens);
    next_[pack] = head_[room.tokens];
    head_[room.tokens] = pack;
  }

  // Removes and returns the pack with the least room >= `wanted`, and its room; kNone if there is none.
  Id take(Room wanted, Room* room) {
    const int64_t tokens = rooms_.at_least(wanted.tokens);
    if (tokens < 0) return kNone;
    *room = {tokens, 0};
    const Id pack = head_[tokens];
    head_[tokens] = next_[pack];
    if (head_[tokens] == kNone) rooms_.erase(tokens);
    return pack;
  }

 private:
  BitSet rooms_;
  std::vector<Id> head_, next_;
};

// The same for a capacity too large for a table.
class RoomTree {
 public:
  explicit RoomTree(int64_t) {}

  void put(Id pack, Room room) { packs_[room.tokens].push_back(pack); }

  Id take(Room wanted, Room* room) {
    const auto found = packs_.lower_bound(wanted.tokens);
    if (found == packs_.end()) return kNone;
    *room = {found->first, 0};
    const Id pack = found->second.back();
    found->second.pop_back();
    if (found->second.empty()) packs_.erase(found);
    return pack;
  }

 private:
  std::map<int64_t, std::vector<Id>> packs_;
};

// Packs with room for images too: among those that fit the item, the least room, then the least room for images, then
// the most recent. A tournament tree over rooms, whose nodes hold the maximum room for images below them, skips rooms
// with too little; above the table limit rooms are scanned one by one.
class RoomsWithImages {
 public:
  explicit RoomsWithImages(int64_t capacity) {
    if (capacity >= table_limit(0)) return;
    while (leaves_ <= capacity) leaves_ *= 2;
    most_.assign(2 * leaves_, kNone);
  }

  void put(Id pack, Room room) {
    packs_[room.tokens][room.images].push_back(pack);
    update(room.tokens);
  }

  Id take(Room wanted, Room* room) {
    const auto found = first(wanted);
    if (found == packs_.end()) return kNone;
    auto& by_images = found->second;
    const auto list = by_images.lower_bound(wanted.images);
    *room = {found->first, list->first};
    const Id pack = list->second.back();
    list->second.pop_back();
    if (list->second.empty()) by_images.erase(list);
    if (by_images.empty()) packs_.erase(found);
    update(room->tokens);
    return pack;
  }

 private:
  using ByImages = std::map<int64_t, std::vector<Id>>;
  using Packs = std::map<int64_t, ByImages>;

  Packs::iterator first(Room wanted) {
    if (most_.empty()) {
      auto found = packs_.lower_bound(wanted.tokens);
      while (found != packs_.end() && found->second.rbegin()->first < wanted.images) ++found;
      return found;
    }
    int64_t node = leaves_ + wanted.tokens;
    while (most_[node] < wanted.images) {  // up and to the right, then down
      while ((node & 1) != 0) node /= 2;
      if (node == 0) return packs_.end();
      ++node;
    }
    while (node < leaves_) node = 2 * node + (most_[2 * node] < wanted.images ? 1 : 0);
    return packs_.find(node - leaves_);
  }

  void update(int64_t tokens) {
    if (most_.empty()) return;
    const auto found = packs_.find(tokens);
    int64_t node = leaves_ + tokens;
    most_[node] = found == packs_.end() ? kNone : found->second.rbegin()->first;
    for (node /= 2; node > 0; node /= 2) most_[node] = std::max(most_[2 * node], most_[2 * node + 1]);
  }

  Packs packs_;
  int64_t leaves_ = 1;
  std::vector<int64_t> most_;  // [2 * leaves]: the root is 1, the leaf of a room is leaves + room
};

// Calls run<Rooms>() with the structure suited to the caps and the capacity.
template <class F>
auto with_rooms(Items items, Caps caps, F run) {
  if (items.images != nullptr && caps.images != kNoCap) return run(RoomsWithImages(caps.tokens));
  if (caps.tokens < table_limit(items.n)) return run(RoomTable(caps.tokens));
  return run(RoomTree(caps.tokens));
}

}  // namespace mmk
