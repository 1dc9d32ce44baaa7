#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "async.h"
#include "async_state.h"
#include "emulator.h"

namespace emulator {

namespace {

constexpr unsigned kWarpgroup = 128;
constexpr int kRegisters = 64 * 1024;

struct Accumulator {
  std::vector<float> values;  // [64, columns]
  std::array<float*, kWarpgroup> registers{};
};

struct Product {
  WarpgroupProduct common;
  std::array<const uint32_t*, kWarpgroup> a{};
  std::array<std::array<uint32_t, 4>, kWarpgroup> a_issued{};
  std::shared_ptr<Accumulator> acc;
  unsigned issued = 0, retired = 0;  // by this many threads
  bool done = false;
};

struct ThreadProducts {
  size_t issued = 0, retired = 0;
  std::deque<size_t> groups;  // products issued by the end of each
  size_t committed = 0;
  bool fenced = false;
};

struct Warpgroup {
  std::vector<Product> products;
  size_t done = 0;
  int registers = 0;
  unsigned register_calls = 0;
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
  uint64_t generation = 0;
};

std::vector<Warpgroup> warpgroups;
std::vector<ThreadProducts> thread_products;
std::array<NamedBarrier, 16> named;

// Element (outer, k) of an operand of 64 or `columns` outer positions and 16 summed ones.
float operand(uint64_t descriptor, bool outer_major, int outer, int k, float (*to_float)(uint16_t)) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const auto o = static_cast<uint32_t>(outer), i = static_cast<uint32_t>(k);
  const uint32_t address = outer_major ? start + o % 64 * 2 + o / 64 * leading + i % 8 * 128 + i / 8 * stride
                                       : start + i * 2 + o % 8 * 128 + o / 8 * stride;
  uint16_t bits;
  std::memcpy(&bits, &async_view[inside(swizzled(address), 2, "wgmma")], 2);
  return to_float(bits);
}

void check_descriptor(uint64_t descriptor) {
  if (descriptor >> 62 != 1) fail("wgmma: only the 128-byte swizzle is emulated");
  if ((descriptor & 0x3ffec000c000c000ull) != 0)
    fail("wgmma: descriptor with a base offset or bits that have no meaning");
}

__attribute__((optimize("O3"))) void multiply(float* acc, const float* a, const float* b, int columns) {
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float x = a[row * 16 + k];
      for (int column = 0; column < columns; ++column) acc[row * columns + column] += x * b[k * columns + column];
    }
  }
}

void run(Product& product) {
  const WarpgroupProduct& p = product.common;
  std::vector<float> a(64 * 16), b(16 * static_cast<size_t>(p.columns));
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      float& value = a[static_cast<size_t>(row) * 16 + k];
      if (p.a == nullptr) {
        value = operand(p.a_descriptor, p.a_outer, row, k, p.to_float);
        continue;
      }
      const unsigned lane = static_cast<unsigned>(row / 16 * 32 + row % 8 * 4 + k % 8 / 2);
      const uint32_t pair = product.a_issued[lane][static_cast<size_t>(k / 8 * 2 + row % 16 / 8)];
      value = p.to_float(static_cast<uint16_t>(pair >> (16 * (k % 2))));
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < p.columns; ++column) {
      b[static_cast<size_t>(k) * p.columns + column] = operand(p.b_descriptor, p.b_outer, column, k, p.to_float);
    }
  }
  std::vector<float>& acc = product.acc->values;
  if (!p.add) std::fill(acc.begin(), acc.end(), 0.f);
  multiply(acc.data(), a.data(), b.data(), p.columns);
  product.done = true;
}

// Register `i` of a thread in [64, columns].
size_t fragment(unsigned thread, int i, int columns) {
  const unsigned warp = thread / 32, lane = thread % 32;
  const unsigned row = 16 * warp + lane / 4 + static_cast<unsigned>(i % 4 / 2 * 8);
  const unsigned column = static_cast<unsigned>(i / 4 * 8) + 2 * (lane % 4) + static_cast<unsigned>(i % 2);
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + column;
}

bool run_next(Warpgroup& group) {
  if (group.done == group.products.size() || group.products[group.done].issued < kWarpgroup) return false;
  run(group.products[group.done]);
  ++group.done;
  return true;
}

Warpgroup& own_warpgroup() {
  const unsigned index = thread_index() / kWarpgroup;
  if ((index + 1) * kWarpgroup > num_threads()) fail("a warpgroup of fewer than 128 threads");
  return warpgroups[index];
}

// Delivers the accumulator to the threads that wait for it; the others keep NaN until they do.
void retire(ThreadProducts& mine, Warpgroup& group, size_t end) {
  const unsigned lane = thread_index() % kWarpgroup;
  for (; mine.retired < end; ++mine.retired) {
    Product& product = group.products[mine.retired];
    if (product.a[lane] != nullptr && std::memcmp(product.a[lane], product.a_issued[lane].data(), 16) != 0) {
      fail("registers of A were changed before the product was done");
    }
    bool in_flight = false;
    for (size_t later = mine.retired + 1; later < mine.issued; ++later) {
      in_flight = in_flight || group.products[later].acc == product.acc;
    }
    const int columns = product.common.columns;
    float* registers = product.acc->registers[lane];
    for (int i = 0; i < columns / 2 && !in_flight; ++i) {
      registers[i] = product.acc->values[fragment(lane, i, columns)];
    }
    if (++product.retired == kWarpgroup) product.acc.reset();
  }
}

}  // namespace

void begin_wgmma(unsigned threads) {
  warpgroups.assign((threads + kWarpgroup - 1) / kWarpgroup, Warpgroup{});
  for (Warpgroup& group : warpgroups) group.registers = kRegisters / static_cast<int>(threads) / 8 * 8;
  thread_products.assign(threads, ThreadProducts{});
  named.fill(NamedBarrier{});
}

bool step_wgmma(bool now, double product_chance) {
  bool happened = false;
  for (Warpgroup& group : warpgroups) {
    while ((now || chance(product_chance)) && run_next(group)) happened = true;
  }
  return happened;
}

void end_wgmma() {
  for (const ThreadProducts& thread : thread_products) {
    if (thread.retired != thread.issued) fail("a block ends with wgmma products that nobody waited for");
  }
  int registers = 0;
  bool asked = false;  // setmaxnreg is for whole warpgroups; blocks without it may have others
  for (const Warpgroup& group : warpgroups) {
    registers += group.registers * static_cast<int>(kWarpgroup);
    asked = asked || group.register_calls > 0;
  }
  if (asked && registers > kRegisters) fail("setmaxnreg: " + std::to_string(registers) + " registers");
}

void wgmma_fence() { thread_products[thread_index()].fenced = true; }

void wgmma(const WarpgroupProduct& product) {
  Warpgroup& group = own_warpgroup();
  ThreadProducts& mine = thread_products[thread_index()];
  const unsigned lane = thread_index() % kWarpgroup;
  if (!mine.fenced) fail("wgmma without wgmma.fence");
  if (product.a == nullptr) check_descriptor(product.a_descriptor);
  check_descriptor(product.b_descriptor);

  const size_t index = mine.issued++;
  if (index == group.products.size()) {
    ++counts.warpgroup_products;
    Product next{};
    next.common = product;
    for (size_t earlier = index; earlier-- > mine.retired;) {  // an accumulator in flight?
      if (group.products[earlier].acc->registers[lane] == product.acc) {
        next.acc = group.products[earlier].acc;
        break;
      }
    }
    if (next.acc == nullptr) {
      next.acc = std::make_shared<Accumulator>();
      next.acc->values.resize(64 * static_cast<size_t>(product.columns));
    }
    group.products.push_back(std::move(next));
  }
  Product& shared = group.products[index];
  if (!shared.common.same(product)) fail("wgmma: threads of a warpgroup disagree");
  Accumulator& acc = *shared.acc;
  if (acc.values.size() != 64 * static_cast<size_t>(product.columns)) fail("wgmma: accumulators of different shapes");
  if (acc.registers[lane] == nullptr) {
    acc.registers[lane] = product.acc;
    for (int i = 0; i < product.columns / 2; ++i) {
      acc.values[fragment(lane, i, product.columns)] = product.acc[i];
      std::memset(&product.acc[i], 0xff, sizeof(float));
    }
  } else if (acc.registers[lane] != product.acc) {
    fail("wgmma: threads of a warpgroup disagree on the accumulator");
  }
  if (product.a != nullptr) {
    shared.a[lane] = product.a;
    std::memcpy(shared.a_issued[lane].data(), product.a, 16);
  }
  ++shared.issued;
}

void wgmma_commit() {
  ThreadProducts& mine = thread_products[thread_index()];
  mine.groups.push_back(mine.issued);
  mine.committed = mine.issued;
  mine.fenced = false;
}

void wgmma_wait(int pending) {
  ThreadProducts& mine = thread_products[thread_index()];
  if (mine.committed != mine.issued) fail("wgmma.wait_group: products that were never committed");
  if (mine.groups.size() <= static_cast<size_t>(pending)) return;
  const size_t end = mine.groups[mine.groups.size() - static_cast<size_t>(pending) - 1];
  Warpgroup& group = own_warpgroup();
  wait_until("wgmma.wait_group", [&group, end] { return group.done >= end; });
  retire(mine, group, end);
  while (mine.groups.size() > static_cast<size_t>(pending)) mine.groups.pop_front();
}

void set_registers(int count, bool more) {
  if (count < 24 || count > 256 || count % 8 != 0) fail("setmaxnreg: " + std::to_string(count));
  Warpgroup& group = own_warpgroup();
  if (group.register_calls++ % kWarpgroup == 0) {
    if (more ? count < group.registers : count > group.registers) fail("setmaxnreg in the wrong direction");
    group.registers = count;
  } else if (group.registers != count) {
    fail("setmaxnreg: threads of a warpgroup disagree");
  }
}

void named_barrier(int id, int threads, bool wait) {
  if (id < 1 || id > 15 || threads % 32 != 0) fail("named barrier: bad number or count");
  NamedBarrier& barrier = named[static_cast<size_t>(id)];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) fail("named barrier: counts differ");
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  if (wait) wait_until("bar.sync", [&barrier, generation] { return barrier.generation != generation; });
}

}  // namespace emulator
