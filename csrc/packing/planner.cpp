#include "packing/planner.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

#include "common/check.h"

namespace mmk {
namespace {

// Pack and item numbers inside the planner; half the memory traffic of int64.
using Id = int32_t;
constexpr Id kNone = -1;

// Tables indexed by length or room are used up to this size; beyond it, sorting and a tree.
int64_t table_limit(int64_t n) { return std::max<int64_t>(int64_t{1} << 20, 8 * n); }

// A set of small integers: 64-ary bitmaps, one bit of a level saying whether a word of the level below is not zero.
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

// Open packs by the room they have left, last in first out among equals: a table of linked lists and the set of rooms
// that have one.
class RoomTable {
 public:
  explicit RoomTable(int64_t capacity) : rooms_(capacity + 1), head_(capacity + 1, kNone) {}

  void put(Id pack, int64_t room) {
    if (static_cast<size_t>(pack) >= next_.size()) next_.resize(pack + 1);
    if (head_[room] == kNone) rooms_.insert(room);
    next_[pack] = head_[room];
    head_[room] = pack;
  }

  // Takes out the pack with the least room that is at least `wanted`, and says how much that is; kNone if there is
  // none.
  Id take(int64_t wanted, int64_t* room) {
    *room = rooms_.at_least(wanted);
    if (*room < 0) return kNone;
    const Id pack = head_[*room];
    head_[*room] = next_[pack];
    if (head_[*room] == kNone) rooms_.erase(*room);
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

  void put(Id pack, int64_t room) { packs_[room].push_back(pack); }

  Id take(int64_t wanted, int64_t* room) {
    const auto found = packs_.lower_bound(wanted);
    if (found == packs_.end()) return kNone;
    *room = found->first;
    const Id pack = found->second.back();
    found->second.pop_back();
    if (found->second.empty()) packs_.erase(found);
    return pack;
  }

 private:
  std::map<int64_t, std::vector<Id>> packs_;
};

// Items from the longest to the shortest, the earlier of equals first.
std::vector<Id> longest_first(const int64_t* lengths, int64_t n) {
  std::vector<Id> order(n);
  const int64_t longest = n > 0 ? *std::max_element(lengths, lengths + n) : 0;
  if (longest >= table_limit(n)) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](Id a, Id b) { return lengths[a] > lengths[b]; });
    return order;
  }
  std::vector<Id> start(longest + 2, 0);  // start[longest - length] after the sums
  for (int64_t i = 0; i < n; ++i) ++start[longest - lengths[i] + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int64_t i = 0; i < n; ++i) order[start[longest - lengths[i]]++] = static_cast<Id>(i);
  return order;
}

// CSR from the pack of each item, packs renumbered by their first item.
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

template <class Rooms>
Plan best_fit(const int64_t* lengths, int64_t n, int64_t capacity, int64_t max_items) {
  const std::vector<Id> order = longest_first(lengths, n);
  std::vector<Id> pack_of(n);
  std::vector<int64_t> count;  // items in each pack
  Rooms rooms(capacity);
  for (int64_t k = 0; k < n;) {
    const int64_t length = lengths[order[k]];
    int64_t room;
    Id pack = rooms.take(length, &room);
    if (pack == kNone) {
      pack = static_cast<Id>(count.size());
      room = capacity;
      count.push_back(0);
    }
    // Equal items go on into the same pack: what it has left is less than any other that would do.
    do {
      pack_of[order[k++]] = pack;
      room -= length;
    } while (++count[pack] < max_items && k < n && room >= length && lengths[order[k]] == length);
    if (count[pack] < max_items) rooms.put(pack, room);
  }
  return by_first_item(pack_of, static_cast<Id>(count.size()));
}

// The sums that subsets of the items seen so far can have, up to a limit, as they were after each item: a bit that is
// set once stays set, so the first item that made a sum possible is found by bisection.
class ReachableSums {
 public:
  ReachableSums(int64_t most_items, int64_t most_sum)
      : row_words_(most_sum / 64 + 1),
        bits_((most_items + 1) * row_words_),
        words_(most_items + 1),
        length_(most_items + 1) {}

  void restart(int64_t limit) {
    limit_ = limit;
    total_ = steps_ = 0;
    words_[0] = 1;
    bits_[0] = 1;  // the empty subset
  }

  // Adds an item of length in [1, limit]; says whether the limit can now be met exactly.
  bool add(int64_t length) {
    const uint64_t* old = row(steps_);
    const int64_t old_words = words_[steps_];
    length_[++steps_] = length;
    total_ = std::min(limit_, total_ + length);
    uint64_t* now = row(steps_);
    const int64_t words = words_[steps_] = total_ / 64 + 1, jump = length / 64;
    const int shift = length % 64;
    const int64_t kept = std::min(old_words, words);
    std::copy(old, old + kept, now);
    std::fill(now + kept, now + words, 0);
    const int64_t moved = std::min(old_words, words - jump);
    if (shift == 0) {
      for (int64_t w = 0; w < moved; ++w) now[w + jump] |= old[w];
    } else {
      for (int64_t w = 0; w < moved; ++w) now[w + jump] |= old[w] << shift;
      for (int64_t w = 0; w < std::min(old_words, words - jump - 1); ++w) now[w + jump + 1] |= old[w] >> (64 - shift);
    }
    return reached(steps_, limit_);
  }

  // Calls fn(step) for each item of a subset with the largest sum, the youngest first; steps count from 1.
  template <class F>
  void largest(F fn) const {
    int64_t sum = limit_;
    while (!reached(steps_, sum)) --sum;
    for (int64_t last = steps_; sum > 0;) {
      int64_t low = 0, high = last;  // reached(low) is false, reached(high) is true
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (reached(middle, sum) ? high : low) = middle;
      }
      fn(high);
      sum -= length_[high];
      last = high - 1;
    }
  }

 private:
  const uint64_t* row(int64_t step) const { return bits_.data() + step * row_words_; }
  uint64_t* row(int64_t step) { return bits_.data() + step * row_words_; }
  bool reached(int64_t step, int64_t sum) const {
    return sum / 64 < words_[step] && (row(step)[sum / 64] >> (sum % 64) & 1) != 0;
  }

  int64_t row_words_, limit_ = 0, total_ = 0, steps_ = 0;
  std::vector<uint64_t> bits_;  // [steps + 1, row_words]
  std::vector<int64_t> words_;  // words of a row in use; those beyond count as zero
  std::vector<int64_t> length_;
};

void check_count(int64_t n) {
  MMK_CHECK(n <= std::numeric_limits<Id>::max(), "plan_packing takes at most 2^31 - 1 items, got ", n);
}

}  // namespace

Plan plan_subset_sum(const int64_t* lengths, int64_t n, int64_t capacity, int64_t lookahead) {
  check_count(n);
  MMK_CHECK(capacity <= kMostSubsetSum, "plan_subset_sum takes a capacity of at most 2^24, got ", capacity);
  lookahead = std::min(lookahead, n);
  std::vector<Id> pack_of(n), waiting, step_of;  // step_of: the waiting item of each step of the sums
  ReachableSums sums(lookahead, capacity);
  Id packs = 0;
  for (int64_t cursor = 0; cursor < n || !waiting.empty(); ++packs) {
    while (cursor < n && static_cast<int64_t>(waiting.size()) < lookahead) waiting.push_back(static_cast<Id>(cursor++));
    const int64_t room = capacity - lengths[waiting[0]];
    pack_of[waiting[0]] = packs;
    waiting[0] = kNone;
    sums.restart(room);
    step_of.assign(1, kNone);
    bool met = room == 0;
    for (Id w = 1; w < static_cast<Id>(waiting.size()); ++w) {
      const int64_t length = lengths[waiting[w]];
      if (length == 0) {  // takes no room
        pack_of[waiting[w]] = packs;
        waiting[w] = kNone;
      } else if (!met && length <= room) {
        step_of.push_back(w);
        met = sums.add(length);
      }
    }
    sums.largest([&](int64_t step) {
      pack_of[waiting[step_of[step]]] = packs;
      waiting[step_of[step]] = kNone;
    });
    waiting.erase(std::remove(waiting.begin(), waiting.end(), kNone), waiting.end());
  }
  return by_first_item(pack_of, packs);
}

Plan plan_next_fit(const int64_t* lengths, int64_t n, int64_t capacity, int64_t max_items) {
  check_count(n);
  std::vector<Id> pack_of(n);
  Id packs = 0;
  int64_t room = 0, count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (packs == 0 || lengths[i] > room || count == max_items) {
      ++packs;
      room = capacity;
      count = 0;
    }
    room -= lengths[i];
    ++count;
    pack_of[i] = packs - 1;
  }
  return by_first_item(pack_of, packs);
}

Plan plan_best_fit(const int64_t* lengths, int64_t n, int64_t capacity, int64_t max_items) {
  check_count(n);
  if (capacity < table_limit(n)) return best_fit<RoomTable>(lengths, n, capacity, max_items);
  return best_fit<RoomTree>(lengths, n, capacity, max_items);
}

}  // namespace mmk
