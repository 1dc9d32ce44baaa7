// Shared by the strategies: item orders, and building the plan from each item's pack.
#pragma once

#include <cstdint>
#include <vector>

#include "packing/planner.h"
#include "packing/planner_rooms.h"

namespace mmk {

// Throws if there are more items than an Id can number.
void check_count(int64_t n);

// Items from longest to shortest; ties: more images first, then earlier.
std::vector<Id> longest_first(Items items);

// CSR plan from each item's pack, with packs renumbered by their first item.
Plan by_first_item(const std::vector<Id>& pack_of, Id num_packs);

}  // namespace mmk
