#include "attention/attention_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace mmk {
namespace {

constexpr int64_t kNowhere = std::numeric_limits<int64_t>::max();

// Register tiles round work up to 12 queries and 32 keys (for the widest instruction set). The overhead of another tile
// is about a tile of 16 x 32.
constexpr int64_t kRowStep = 12, kColStep = 32, kTileOverhead = 512;

int64_t round_up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Hull {
  int64_t begin = kNowhere, end = 0;
  bool empty() const { return begin >= end; }
  void add(int64_t lo, int64_t hi) {
    begin = std::min(begin, lo);
    end = std::max(end, hi);
  }
  int64_t length() const { return empty() ? 0 : end - begin; }
};

int64_t tile_cost(int64_t rows, const Hull& keys) {
  return round_up_to(rows, kRowStep) * round_up_to(keys.length(), kColStep) + kTileOverhead;
}

// Builds one tile; rows with an empty interval see nothing and do not extend the hull.
struct Rows {
  int64_t begin, end;
  Hull keys;
  int64_t all_from = 0, all_to = kNowhere;

  void append(const Rows& next) {
    end = next.end;
    if (!next.keys.empty()) keys.add(next.keys.begin, next.keys.end);
    all_from = std::max(all_from, next.all_from);
    all_to = std::min(all_to, next.all_to);
  }
  QueryTile tile() const {
    const int64_t key_begin = keys.empty() ? 0 : keys.begin;
    return {begin, end, key_begin, key_begin + keys.length(), all_from, std::max(all_from, all_to)};
  }
};

// At most `limit` consecutive queries starting at `begin`, each of whose intervals touches the previous ones.
Rows next_run(const int32_t* lo, const int32_t* hi, int64_t begin, int64_t limit, int64_t num_keys) {
  Rows run{begin, begin, {}};
  for (; run.end < limit; ++run.end) {
    const int64_t from = std::max<int64_t>(lo[run.end], 0), to = std::min<int64_t>(hi[run.end], num_keys);
    if (from < to) {
      if (!run.keys.empty() && (from >= run.keys.end || to <= run.keys.begin)) break;
      run.keys.add(from, to);
    }
    run.all_from = std::max(run.all_from, from);
    run.all_to = std::min(run.all_to, std::max(to, int64_t{0}));
  }
  return run;
}

// Merges runs into one tile while a product over both costs less than two products: tiny segments share tiles, larger
// segments are not mixed.
std::vector<QueryTile> cut_tiles(const int32_t* lo, const int32_t* hi, int64_t num_queries, int64_t num_keys) {
  std::vector<QueryTile> tiles;
  Rows open{0, 0, {}};
  for (int64_t i = 0; i < num_queries;) {
    const Rows run = next_run(lo, hi, i, std::min(i + kQueryTile, num_queries), num_keys);
    Rows joined = open;
    joined.append(run);
    const int64_t rows = joined.end - joined.begin;
    const int64_t apart = tile_cost(open.end - open.begin, open.keys) + tile_cost(run.end - run.begin, run.keys);
    if (open.begin == open.end) {
      open = run;
    } else if (rows <= kQueryTile && tile_cost(rows, joined.keys) <= apart) {
      open = joined;
    } else {
      tiles.push_back(open.tile());
      open = run;
    }
    i = run.end;
  }
  if (open.begin < open.end) tiles.push_back(open.tile());
  return tiles;
}

int64_t pairs(const QueryTile& tile, int64_t key_begin, int64_t key_end) {
  const int64_t seen = std::min(tile.key_end, key_end) - std::max(tile.key_begin, key_begin);
  return (tile.end - tile.begin) * std::max<int64_t>(seen, 0);
}

}  // namespace

struct AttentionPlan::Lists {
  int64_t num_keys;
  std::vector<QueryTile> tiles;
  std::vector<AttentionTask> components, tasks;
};

AttentionPlan::AttentionPlan(const int32_t* lo, const int32_t* hi, int64_t num_queries, int64_t num_keys)
    : lists_(new Lists{num_keys, cut_tiles(lo, hi, num_queries, num_keys), {}, {}}) {
  const std::vector<QueryTile>& tiles = lists_->tiles;
  tiles_ = tiles.data();
  const int64_t count = num_tiles();
  std::vector<int64_t> next_begin(count + 1, num_keys);  // first key seen by this and later tiles
  for (int64_t t = count - 1; t >= 0; --t) {
    const bool sees = tiles[t].key_begin < tiles[t].key_end;
    next_begin[t] = sees ? std::min(next_begin[t + 1], tiles[t].key_begin) : next_begin[t + 1];
  }
  AttentionTask open{0, 0, 0, 0, 0};
  int64_t seen_to = 0;
  for (int64_t t = 0; t < count; ++t) {
    if (t > open.tile_begin && seen_to <= next_begin[t]) {
      open.tile_end = t;
      open.key_end = next_begin[t];
      lists_->components.push_back(open);
      open = {t, t, next_begin[t], next_begin[t], 0};
    }
    seen_to = std::max(seen_to, tiles[t].key_end);
  }
  open.tile_end = count;
  open.key_end = num_keys;
  lists_->components.push_back(open);
}

AttentionPlan::~AttentionPlan() { delete lists_; }

int64_t AttentionPlan::num_tiles() const { return static_cast<int64_t>(lists_->tiles.size()); }
int64_t AttentionPlan::num_pairs() const {
  int64_t sum = 0;
  for (const QueryTile& tile : lists_->tiles) sum += pairs(tile, 0, lists_->num_keys);
  return sum;
}
int64_t AttentionPlan::num_tasks() const { return static_cast<int64_t>(lists_->tasks.size()); }

void AttentionPlan::cut_components() {
  lists_->tasks = lists_->components;
  finish();
}

void AttentionPlan::cut_queries(int64_t max_tiles) {
  lists_->tasks.clear();
  for (const AttentionTask& part : lists_->components)
    for (int64_t t = part.tile_begin; t < part.tile_end; t += max_tiles)
      lists_->tasks.push_back({t, std::min(t + max_tiles, part.tile_end), part.key_begin, part.key_end, 0});
  finish();
}

void AttentionPlan::cut_keys(int64_t max_keys) {
  lists_->tasks.clear();
  for (const AttentionTask& part : lists_->components)
    for (int64_t k = part.key_begin; k < part.key_end; k += max_keys)
      lists_->tasks.push_back({part.tile_begin, part.tile_end, k, std::min(k + max_keys, part.key_end), 0});
  finish();
}

void AttentionPlan::finish() {
  std::vector<AttentionTask>& tasks = lists_->tasks;
  for (AttentionTask& task : tasks) {
    task.cost = 1 + task.key_end - task.key_begin;
    for (int64_t t = task.tile_begin; t < task.tile_end; ++t)
      task.cost += tiles_[t].end - tiles_[t].begin + pairs(tiles_[t], task.key_begin, task.key_end);
  }
  // Most expensive first; ties stay in memory order.
  const auto magnitude = [](const AttentionTask& task) { return std::ilogb(static_cast<double>(task.cost)); };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const AttentionTask& a, const AttentionTask& b) { return magnitude(a) > magnitude(b); });
  tasks_ = tasks.data();
}

int64_t AttentionPlan::longest_key_range() const {
  int64_t longest = 0;
  for (const AttentionTask& task : lists_->tasks) longest = std::max(longest, task.key_end - task.key_begin);
  return longest;
}

bool AttentionPlan::balanced(int64_t heads, int num_threads, double slack) const {
  double total = 0, largest = 0;
  for (const AttentionTask& task : lists_->tasks) {
    total += static_cast<double>(task.cost * heads);
    largest = std::max(largest, static_cast<double>(task.cost));
  }
  const double even = total / num_threads;
  if (even + largest <= slack * even) return true;  // the last task delays completion by at most one task
  if (num_tasks() * heads > 64 * num_threads) return false;
  std::vector<double> load(num_threads, 0.0);
  for (const AttentionTask& task : lists_->tasks)
    for (int64_t h = 0; h < heads; ++h) *std::min_element(load.begin(), load.end()) += static_cast<double>(task.cost);
  return *std::max_element(load.begin(), load.end()) <= slack * even;
}

}  // namespace mmk
