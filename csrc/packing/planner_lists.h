// From an order and the pack of each item to the plan: what the strategies share.
#pragma once

#include <cstdint>
#include <vector>

#include "packing/planner.h"
#include "packing/planner_rooms.h"

namespace mmk {

// Fails for more items than an Id can number.
void check_count(int64_t n);

// Items from the longest to the shortest, of equals the one with more images first, then the earlier.
std::vector<Id> longest_first(Items items);

// CSR from the pack of each item, packs renumbered by their first item.
Plan by_first_item(const std::vector<Id>& pack_of, Id num_packs);

}  // namespace mmk
