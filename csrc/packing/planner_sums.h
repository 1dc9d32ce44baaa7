// The reachable sums of subsets of items after each item, for the age-ordered subset sum.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace mmk {

// One bit per sum. Bits stay set, so binary search finds the first item that made a sum reachable.
class ReachableSums {
 public:
  ReachableSums(int64_t most_items, int64_t most_sum)
      : row_words_(most_sum / 64 + 1),
        bits_(new uint64_t[(most_items + 1) * row_words_]),
        words_(most_items + 1),
        length_(most_items + 1) {}

  void restart(int64_t limit) {
    limit_ = limit;
    total_ = steps_ = 0;
    words_[0] = 1;
    bits_[0] = 1;  // the empty subset
  }

  // Adds an item of length in [1, limit]; returns whether the limit can now be met exactly.
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

  // Calls fn(step) for each item of a subset with the largest sum, youngest first; steps count from 1.
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
  const uint64_t* row(int64_t step) const { return bits_.get() + step * row_words_; }
  uint64_t* row(int64_t step) { return bits_.get() + step * row_words_; }
  bool reached(int64_t step, int64_t sum) const {
    return sum / 64 < words_[step] && (row(step)[sum / 64] >> (sum % 64) & 1) != 0;
  }

  int64_t row_words_, limit_ = 0, total_ = 0, steps_ = 0;
  std::unique_ptr<uint64_t[]> bits_;  // [steps + 1, row_words]
  std::vector<int64_t> words_;        // words of a row in use; the rest count as zero
  std::vector<int64_t> length_;
};

// The least cost of each sum, with a limit on a subset's cost. The cost of a sum never rises from item to item, so
// binary search finds the first item after which it is affordable.
class CheapestSums {
 public:
  CheapestSums(int64_t most_items, int64_t most_sum)
      : row_(most_sum + 1),
        least_(new int32_t[(most_items + 1) * row_]),
        width_(most_items + 1),
        length_(most_items + 1),
        cost_(most_items + 1) {}

  // Subsets may have sums up to limit and costs up to most < kUnreachable.
  void restart(int64_t limit, int64_t most) {
    limit_ = limit;
    most_ = static_cast<int32_t>(most);
    steps_ = 0;
    width_[0] = 1;
    least_[0] = 0;
  }

  // Adds an item of length in [1, limit] that is affordable alone; returns whether the limit can now be met exactly.
  bool add(int64_t length, int64_t cost_of_item) {
    const int32_t cost = static_cast<int32_t>(cost_of_item), most = most_;
    const int32_t* old = row(steps_);
    const int64_t old_width = width_[steps_];
    length_[++steps_] = length;
    cost_[steps_] = cost;
    int32_t* now = row(steps_);
    const int64_t width = width_[steps_] = std::min(limit_, old_width - 1 + length) + 1;
    std::copy(old, old + old_width, now);
    std::fill(now + old_width, now + width, kUnreachable);
    int32_t* moved = now + length;
    const int64_t count = std::min(old_width, width - length);
    for (int64_t s = 0; s < count; ++s) {
      const int32_t sum = old[s] + cost;
      moved[s] = std::min(moved[s], sum > most ? kUnreachable : sum);
    }
    return affordable(limit_);
  }

  // The largest affordable sum whose oldest items, written to *steps youngest first, satisfy keep(); if many fail, some
  // sums are skipped without a test. The empty subset is always accepted.
  template <class Keep>
  int64_t largest(std::vector<int64_t>* steps, Keep keep) const {
    int64_t seen = 0;
    for (int64_t sum = limit_; sum > 0; sum -= 1 + seen / 64) {
      if (!affordable(sum)) continue;
      trace(sum, steps);
      if (keep()) return sum;
      ++seen;
    }
    steps->clear();
    return 0;
  }

 private:
  static constexpr int32_t kUnreachable = int32_t{1} << 30;

  void trace(int64_t sum, std::vector<int64_t>* steps) const {
    steps->clear();
    int32_t left = most_;
    for (int64_t last = steps_; sum > 0;) {
      int64_t low = 0, high = last;
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (least(middle, sum) <= left ? high : low) = middle;
      }
      steps->push_back(high);
      sum -= length_[high];
      left -= cost_[high];
      last = high - 1;
    }
  }

  const int32_t* row(int64_t step) const { return least_.get() + step * row_; }
  int32_t* row(int64_t step) { return least_.get() + step * row_; }
  int32_t least(int64_t step, int64_t sum) const { return sum < width_[step] ? row(step)[sum] : kUnreachable; }
  bool affordable(int64_t sum) const { return least(steps_, sum) <= most_; }

  int64_t row_, limit_ = 0, steps_ = 0;
  int32_t most_ = 0;
  std::unique_ptr<int32_t[]> least_;  // [steps + 1, row]
  std::vector<int64_t> width_;        // sums of a row in use; the rest count as unreachable
  std::vector<int64_t> length_;
  std::vector<int32_t> cost_;
};

}  // namespace mmk
