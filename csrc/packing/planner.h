// The planner: which items share a pack. Plain C++17, no threads, no torch, compiled once.
//
// Every strategy numbers packs by their first item and lists a pack's items in ascending order, so a plan depends on
// the grouping alone. mmkernels/planning/plan_python.py states the same algorithms in Python, with the same ties.
#pragma once

#include <cstdint>
#include <vector>

namespace mmk {

// What is to be packed. Callers see to it that each item fits into an empty pack.
struct Items {
  const int64_t* lengths;  // [n], each in [0, caps.tokens]
  const int64_t* images;   // [n], each in [0, caps.images]; nullptr: images are not counted
  int64_t n;
};

// The most that a pack may hold; kNoCap for what is not limited.
constexpr int64_t kNoCap = INT64_MAX;
struct Caps {
  int64_t tokens, images, samples;
};

// Packs in CSR form: pack p holds items[offsets[p] : offsets[p + 1]].
struct Plan {
  std::vector<int64_t> offsets;  // [P + 1]
  std::vector<int64_t> items;    // [n]
};

// Best fit decreasing: the longest item first (of equals the one with more images, then the earlier), into the open
// pack that it leaves least room in (of equals the one with less room for images, then the last to have got that room);
// a new pack when none can take it. Without caps on images and samples at most 11/9 of the optimum, plus 6/9.
// O(n + capacity) time and memory; O(n log n) where the capacity dwarfs n; a factor of log(capacity) with image caps.
Plan plan_best_fit(Items items, Caps caps);

// Age-ordered subset sum: the first `lookahead` items not yet packed wait, and fullest_pack takes one pack after the
// other from them.
//
// caps.tokens <= kMostSubsetSum; O(lookahead * capacity / 64) time per pack and as many bytes * 8 in all, or 32 times
// that with a cap on images or samples.
constexpr int64_t kMostSubsetSum = int64_t{1} << 24;
Plan plan_subset_sum(Items items, Caps caps, int64_t lookahead);

// The next pack of the items that wait, oldest first: their places, ascending, the first among them. The oldest opens
// the pack; the others join, oldest first, the set of the sums that the rest of the pack can have, until the capacity
// is met exactly or all have joined. The pack becomes the largest sum, made of the oldest items that made it possible.
// Nearly keeps the order.
//
// With a cap on images the set keeps the fewest images that each sum needs, with a cap on samples alone the fewest
// samples. With both, the pack is the largest sum whose oldest items within the one cap keep the other as well, by
// images first and, where that fills it less, by samples: not always the fullest that there is.
std::vector<int64_t> fullest_pack(Items waiting, Caps caps);

// Next fit: items in their order; one that does not fit closes the pack. No plan that keeps the order has fewer packs.
Plan plan_next_fit(Items items, Caps caps);

// Best fit decreasing over counts: equal items are one class, packs with equal contents one group. Without caps on
// images and samples its packs are those of plan_best_fit up to which of equal items goes where. The packs are not
// listed: steps [k][3] are (first pack, packs, items for each), and each takes its packs * items from where the last
// one stopped, in the order of plan_best_fit.
// O(classes + n) time.
struct CountedPlan {
  std::vector<int64_t> steps;  // [k * 3]
  int64_t packs = 0;
};
CountedPlan plan_histogram(Items items, Caps caps);

// The same for items without images that are counted already: counts [capacity + 1], how many have each length.
CountedPlan plan_counts(const int64_t* counts, Caps caps);

// Lists the packs of a counted plan.
Plan list_histogram(Items items, const CountedPlan& counted);

// One pass over lengths [n]: counts [capacity + 1] gets how many have each length, copy [n] the lengths themselves.
// False when one is negative or longer than the capacity; counts and copy are then of no use.
template <class Copy>
bool count_lengths(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* counts, Copy* copy);

}  // namespace mmk
