// The planner: assigns items to packs. Plain C++17, no threads, no torch, compiled once.
//
// Every strategy numbers packs by their first item and lists a pack's items in ascending order, so a plan depends only
// on the grouping. mmkernels/planning/plan_python.py implements the same algorithms in Python, with the same
// tie-breaking.
#pragma once

#include <cstdint>
#include <vector>

namespace mmk {

// The items to pack. The caller ensures that each fits into an empty pack.
struct Items {
  const int64_t* lengths;  // [n], each in [0, caps.tokens]
  const int64_t* images;   // [n], each in [0, caps.images]; nullptr: images are not counted
  int64_t n;
};

// Capacity of a pack; kNoCap means unlimited.
constexpr int64_t kNoCap = INT64_MAX;
struct Caps {
  int64_t tokens, images, samples;
};

// Packs in CSR form: pack p holds items[offsets[p] : offsets[p + 1]].
struct Plan {
  std::vector<int64_t> offsets;  // [P + 1]
  std::vector<int64_t> items;    // [n]
};

// Best fit decreasing: the longest item first (ties: more images, then earlier), into the open pack that it leaves the
// least room in (ties: less room for images, then the most recently updated), or a new pack if none fits. Without caps
// on images and samples at most 11/9 of the optimum, plus 6/9. O(n + capacity) time and memory; O(n log n) if the
// capacity dwarfs n; a factor of log(capacity) with image caps.
Plan plan_best_fit(Items items, Caps caps);

// Age-ordered subset sum: fullest_pack repeatedly takes a pack from the window of the first `lookahead` unpacked items.
//
// caps.tokens <= kMostSubsetSum; O(lookahead * capacity / 64) time per pack and 8 bytes times that in total, or 32
// times that with a cap on images or samples.
constexpr int64_t kMostSubsetSum = int64_t{1} << 24;
Plan plan_subset_sum(Items items, Caps caps, int64_t lookahead);

// The next pack from the waiting items, oldest first: their positions, ascending, always including the first. The
// oldest item opens the pack. The others, oldest first, extend the set of reachable sums of the rest of the pack, until
// the capacity is met exactly or all are included. The pack realises the largest sum with the oldest items that made it
// reachable. Nearly preserves the order.
//
// With a cap on images the set stores the fewest images per sum; with only a cap on samples, the fewest samples. With
// both caps, the pack is the largest sum whose oldest items within one cap also satisfy the other, tried by images and
// by samples, whichever is fuller: not always the fullest possible pack.
std::vector<int64_t> fullest_pack(Items waiting, Caps caps);

// Next fit: items in order; an item that does not fit closes the pack. Optimal among plans that preserve the order.
Plan plan_next_fit(Items items, Caps caps);

// Best fit decreasing over counts: equal items form a class, packs with equal contents a group. Without caps on images
// and samples its packs equal those of plan_best_fit up to the assignment of equal items. The packs are not listed:
// steps [k][3] are (first pack, packs, items per pack), and each step takes its packs * items where the previous one
// stopped, in the order of plan_best_fit. O(classes + n) time.
struct CountedPlan {
  std::vector<int64_t> steps;  // [k * 3]
  int64_t packs = 0;
};
CountedPlan plan_histogram(Items items, Caps caps);

// The same for pre-counted items without images: counts [capacity + 1], the number of items of each length.
CountedPlan plan_counts(const int64_t* counts, Caps caps);

// Lists the packs of a counted plan.
Plan list_histogram(Items items, const CountedPlan& counted);

// One pass over lengths [n] that fills counts [capacity + 1], the number of items of each length, and copy [n]. Returns
// false if a length is negative or exceeds the capacity; counts and copy are then invalid.
template <class Copy>
bool count_lengths(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* counts, Copy* copy);

}  // namespace mmk
