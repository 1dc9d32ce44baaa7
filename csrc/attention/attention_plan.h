// How the CPU kernels cut the work: queries into tiles, tiles into components, both into tasks.
//
// Compiled once, for the plain machine: everything that touches the standard library is in attention_plan.cpp.
#pragma once

#include <cstdint>

namespace mmk {

constexpr int64_t kQueryTile = 96;  // a multiple of every register tile's rows and columns
constexpr int64_t kKeyTile = 192;

// Consecutive queries that are computed together, and the keys they see.
struct QueryTile {
  int64_t begin, end;            // queries, at most kQueryTile of them
  int64_t key_begin, key_end;    // hull of their intervals; empty if nobody sees a key
  int64_t full_begin, full_end;  // every query of the tile sees all of these
};

// Tiles [tile_begin, tile_end) against keys [key_begin, key_end).
struct AttentionTask {
  int64_t tile_begin, tile_end, key_begin, key_end;
  int64_t cost;  // query-key pairs that are computed, in units of about one
};

class AttentionPlan {
 public:
  AttentionPlan(const int32_t* lo, const int32_t* hi, int64_t num_queries, int64_t num_keys);
  ~AttentionPlan();
  AttentionPlan(const AttentionPlan&) = delete;
  AttentionPlan& operator=(const AttentionPlan&) = delete;

  const QueryTile* tiles() const { return tiles_; }
  int64_t num_tiles() const;
  // Query-key pairs that are computed, those of all tiles with the hulls of their keys.
  int64_t num_pairs() const;

  // Components share no key: a list that covers every tile and every key exactly once.
  void cut_components();
  // Up to `max_tiles` neighbouring tiles of one component, against the component's keys.
  void cut_queries(int64_t max_tiles);
  // All tiles of a component, against up to `max_keys` of its keys.
  void cut_keys(int64_t max_keys);

  // The last cut, most expensive first (to within a factor of two).
  const AttentionTask* tasks() const { return tasks_; }
  int64_t num_tasks() const;
  int64_t longest_key_range() const;
  // Whether `num_threads` threads that each take the next of `heads` copies of every task are done within `slack` times
  // the time of perfectly divisible work.
  bool balanced(int64_t heads, int num_threads, double slack) const;

 private:
  struct Lists;
  void finish();

  Lists* lists_;
  const QueryTile* tiles_ = nullptr;
  const AttentionTask* tasks_ = nullptr;
};

}  // namespace mmk
