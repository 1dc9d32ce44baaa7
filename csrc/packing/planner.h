// The planner: which items share a pack. Plain C++17, no threads, no torch, compiled once.
//
// Every strategy numbers packs by their first item and lists a pack's items in ascending order, so a plan depends on
// the grouping alone. mmkernels/ops/packing/plan_python.py states the same algorithms in Python, with the same ties.
#pragma once

#include <cstdint>
#include <vector>

namespace mmk {

// Packs in CSR form: pack p holds items[offsets[p] : offsets[p + 1]].
struct Plan {
  std::vector<int64_t> offsets;  // [P + 1]
  std::vector<int64_t> items;    // [n]
};

// Best fit decreasing: the longest item first (the earlier of equals), into the open pack that it leaves least room in
// (the last one to have got that room); a new pack when none can take it. At most 11/9 of the optimum, plus 6/9.
// O(n + capacity) time and memory; O(n log n) where the capacity dwarfs n.
//
// lengths [n], each in [0, capacity]; a pack takes at most max_items items (>= 1).
Plan plan_best_fit(const int64_t* lengths, int64_t n, int64_t capacity, int64_t max_items);

// Age-ordered subset sum: the first `lookahead` items not yet packed wait. The oldest opens a pack; the others join,
// oldest first, a bit set of the sums that the rest of the pack can have, until the capacity is met exactly or all have
// joined. The pack becomes the largest sum, made of the oldest items that made it possible. Nearly keeps the order.
//
// capacity <= kMostSubsetSum; O(lookahead * capacity / 64) time per pack and as many bytes * 8 in all.
constexpr int64_t kMostSubsetSum = int64_t{1} << 24;
Plan plan_subset_sum(const int64_t* lengths, int64_t n, int64_t capacity, int64_t lookahead);

// Next fit: items in their order; one that does not fit closes the pack. No plan that keeps the order has fewer packs.
Plan plan_next_fit(const int64_t* lengths, int64_t n, int64_t capacity, int64_t max_items);

}  // namespace mmk
