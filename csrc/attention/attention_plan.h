// How the CPU kernels split work: queries into tiles, tiles into components, both into tasks.
//
// Compiled once, for the baseline: everything that uses the standard library is in attention_plan.cpp.
#pragma once

#include <cstdint>

namespace mmk {

constexpr int64_t kQueryTile = 96;  // a multiple of every register tile's rows and columns
constexpr int64_t kKeyTile = 192;

// Consecutive queries computed together, and the keys they see.
struct QueryTile {
  int64_t begin, end;            // queries, at most kQueryTile of them
  int64_t key_begin, key_end;    // hull of their intervals; empty if no query sees a key
  int64_t full_begin, full_end;  // keys that every query of the tile sees
};

// Tiles [tile_begin, tile_end) against keys [key_begin, key_end).
struct AttentionTask {
  int64_t tile_begin, tile_end, key_begin, key_end;
  int64_t cost;  // computed query-key pairs, approximately
};

class AttentionPlan {
 public:
  AttentionPlan(const int32_t* lo, const int32_t* hi, int64_t num_queries, int64_t num_keys);
  ~AttentionPlan();
  AttentionPlan(const AttentionPlan&) = delete;
  AttentionPlan& operator=(const AttentionPlan&) = delete;

  const QueryTile* tiles() const { return tiles_; }
  int64_t num_tiles() const;
  // Computed query-key pairs: of all tiles with the hulls of their keys.
  int64_t num_pairs() const;

  // Splits into components that share no key; they cover every tile and every key exactly once.
  void cut_components();
  // Tasks of up to `max_tiles` adjacent tiles of one component, against the component's keys.
  void cut_queries(int64_t max_tiles);
  // Tasks of all tiles of a component, against up to `max_keys` of its keys.
  void cut_keys(int64_t max_keys);

  // The tasks of the last cut, most expensive first (within a factor of two).
  const AttentionTask* tasks() const { return tasks_; }
  int64_t num_tasks() const;
  int64_t longest_key_range() const;
  // Whether `num_threads` threads, dynamically taking `heads` copies of every task, finish within `slack` times the
  // time of perfectly divisible work.
  bool balanced(int64_t heads, int num_threads, double slack) const;

 private:
  struct Lists;
  void finish();

  Lists* lists_;
  const QueryTile* tiles_ = nullptr;
  const AttentionTask* tasks_ = nullptr;
};

}  // namespace mmk
