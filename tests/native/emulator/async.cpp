#include "async.h"

#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

namespace {

constexpr unsigned kWarpgroup = 128;
constexpr uint32_t kReserved = 1024;  // of the window, by the system
constexpr int kRegisters = 64 * 1024;

struct BarrierState {
  int arrivals, missing;
  int64_t bytes = 0;
  uint64_t phase = 0;
  unsigned owner;
  bool published = false;
};

struct Transfer {
  bool load;
  TensorBox tensor;
  uint32_t shared;  // offset
  uint32_t barrier;
  int at[3];
  unsigned thread;
  bool committed;
};

struct Accumulator {
  std::vector<float> values;  // [64, columns]
  std::array<float*, kWarpgroup> registers{};
};

struct Product {
  WarpgroupProduct common;
  std::array<const uint32_t*, kWarpgroup> a{};
  std::array<std::array<uint32_t, 4>, kWarpgroup> a_issued{};
  std::shared_ptr<Accumulator> acc;
  unsigned issued = 0, retired = 0;  // by how many of the threads
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

struct PendingStore {
  uint32_t offset;
  std::array<unsigned char, 16> value;
};

std::mt19937_64 source;
double copy_chance = 1., product_chance = 0.;
uint32_t window_offset = 0;
std::vector<unsigned char> async_view;  // shared memory as TMA and wgmma see it
std::map<uint32_t, BarrierState> barriers;
std::vector<Transfer> transfers;
std::vector<Warpgroup> warpgroups;
std::vector<ThreadProducts> thread_products;
std::vector<std::vector<PendingStore>> unpublished;
std::array<NamedBarrier, 16> named;

bool chance(double p) { return std::uniform_real_distribution<double>(0., 1.)(source) < p; }

uint32_t offset_of(const void* pointer, size_t bytes, const char* what) {
  if (!in_shared_memory(pointer, bytes)) fail(std::string(what) + " outside shared memory");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_memory());
}

uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7u) << 4); }

// Offset in shared memory of a window address.
uint32_t inside(uint32_t address, size_t bytes, const char* what) {
  const uint32_t start = kReserved + window_offset;
  if (address < start || address - start + bytes > shared_size()) fail(std::string(what) + " outside shared memory");
  return address - start;
}

BarrierState& barrier_at(uint32_t offset, const char* what) {
  const auto found = barriers.find(offset);
  if (found == barriers.end()) fail(std::string(what) + " of an mbarrier that nobody initialised");
  return found->second;
}

void end_phase_if_complete(BarrierState& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
}

// Calls visit(offset in shared memory, element in global memory or null where there is none) for each of a box.
template <class Visit>
void for_box(const Transfer& t, const Visit& visit) {
  const TensorBox& tensor = t.tensor;
  int index[3];
  uint32_t linear = kReserved + window_offset + t.shared;
  for (index[2] = 0; index[2] < tensor.box[2]; ++index[2]) {
    for (index[1] = 0; index[1] < tensor.box[1]; ++index[1]) {
      for (index[0] = 0; index[0] < tensor.box[0]; ++index[0], linear += 2) {
        bool exists = true;
        int64_t element = 0;
        for (int i = 0; i < 3; ++i) {
          const int64_t at = static_cast<int64_t>(t.at[i]) + index[i];
          exists = exists && at >= 0 && at < tensor.size[i];
          element += at * tensor.stride[i];
        }
        visit(inside(swizzled(linear), 2, "TMA"), exists ? tensor.data + 2 * element : nullptr);
      }
    }
  }
}

uint32_t box_bytes(const TensorBox& tensor) {
  return static_cast<uint32_t>(tensor.box[0] * tensor.box[1] * tensor.box[2] * 2);
}

void complete(const Transfer& t) {
  if (!t.load) {
    for_box(t, [](uint32_t offset, unsigned char* element) {
      if (element != nullptr) std::memcpy(element, &async_view[offset], 2);
    });
    return;
  }
  for_box(t, [](uint32_t offset, const unsigned char* element) {
    const unsigned char zero[2] = {0, 0};
    std::memcpy(&async_view[offset], element != nullptr ? element : zero, 2);
    std::memcpy(shared_memory() + offset, &async_view[offset], 2);
  });
  BarrierState& barrier = barrier_at(t.barrier, "TMA");
  barrier.bytes -= box_bytes(t.tensor);
  end_phase_if_complete(barrier);
}

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

// The threads that wait for an accumulator get it; the others keep NaN until theirs is done.
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

void begin_async(unsigned threads, uint64_t seed) {
  source.seed(seed);
  constexpr double kCopy[] = {1., .3, .05}, kProduct[] = {1., .2, 0.};
  copy_chance = settings.seed == 0 ? 1. : kCopy[source() % 3];
  product_chance = settings.seed == 0 ? 0. : kProduct[source() % 3];
  window_offset = static_cast<uint32_t>(128 * (settings.seed == 0 ? 0 : source() % 8));
  async_view.assign(shared_size(), 0xff);
  barriers.clear();
  transfers.clear();
  warpgroups.assign((threads + kWarpgroup - 1) / kWarpgroup, Warpgroup{});
  for (Warpgroup& group : warpgroups) group.registers = kRegisters / static_cast<int>(threads) / 8 * 8;
  thread_products.assign(threads, ThreadProducts{});
  unpublished.assign(threads, {});
  named.fill(NamedBarrier{});
}

bool step_async(bool now) {
  bool happened = false;
  for (size_t i = 0; i < transfers.size();) {
    if (!transfers[i].committed || !(now || chance(copy_chance))) {
      ++i;
      continue;
    }
    const size_t chosen = settings.seed == 0 ? i : i + source() % (transfers.size() - i);
    if (!transfers[chosen].committed) {
      ++i;
      continue;
    }
    const Transfer transfer = transfers[chosen];
    transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(chosen));
    complete(transfer);
    happened = true;
  }
  for (Warpgroup& group : warpgroups) {
    while ((now || chance(product_chance)) && run_next(group)) happened = true;
  }
  return happened;
}

void end_async() {
  if (!transfers.empty()) fail("a block ends with TMA copies in flight");
  for (const ThreadProducts& thread : thread_products) {
    if (thread.retired != thread.issued) fail("a block ends with wgmma products that nobody waited for");
  }
  for (const auto& stores : unpublished) {
    if (!stores.empty()) fail("a block ends with stores for the async proxy that were never fenced");
  }
  for (const auto& [offset, barrier] : barriers) {
    if (barrier.bytes != 0) fail("an mbarrier expected other bytes than were copied");
  }
  int registers = 0;
  for (const Warpgroup& group : warpgroups) registers += group.registers * static_cast<int>(kWarpgroup);
  if (registers > kRegisters) fail("setmaxnreg: " + std::to_string(registers) + " registers");
}

uint32_t window_address(const void* pointer) { return kReserved + window_offset + offset_of(pointer, 0, "address"); }

void barrier_init(void* barrier, int arrivals) {
  const uint32_t offset = offset_of(barrier, 8, "mbarrier");
  if (offset % 8 != 0) fail("mbarrier: not 8-byte aligned");
  if (barriers.count(offset) != 0) fail("mbarrier initialised twice");
  if (arrivals < 1) fail("mbarrier: at least one arrival");
  BarrierState state{};
  state.arrivals = state.missing = arrivals;
  state.owner = thread_index();
  barriers[offset] = state;
}

void barrier_publish() {
  for (auto& [offset, barrier] : barriers) barrier.published = barrier.published || barrier.owner == thread_index();
}

void barrier_arrive(void* barrier, int expected_bytes) {
  BarrierState& state = barrier_at(offset_of(barrier, 8, "mbarrier"), "arrival");
  state.bytes += expected_bytes;
  if (state.missing == 0) fail("mbarrier: more arrivals than it was initialised for");
  --state.missing;
  end_phase_if_complete(state);
}

void barrier_wait(void* barrier, int parity) {
  const uint32_t offset = offset_of(barrier, 8, "mbarrier");
  const BarrierState* state = &barrier_at(offset, "wait");  // (a map's elements do not move)
  wait_until("mbarrier.try_wait", [=] { return static_cast<int>(state->phase & 1) != parity; });
}

void tma_load(void* shared, const TensorBox& tensor, void* barrier, int x, int y, int z) {
  ++counts.tma_loads;
  const uint32_t bytes = box_bytes(tensor), offset = offset_of(shared, bytes, "TMA writes");
  if (window_address(shared) % 1024 != 0) fail("TMA: a swizzled tile that is not 1024-byte aligned");
  const uint32_t at = offset_of(barrier, 8, "mbarrier");
  if (!barrier_at(at, "TMA").published) fail("TMA: mbarrier without fence.mbarrier_init");
  for (const Transfer& other : transfers) {
    if (other.shared < offset + bytes && offset < other.shared + box_bytes(other.tensor)) {
      fail("TMA: two transfers of the same shared memory in flight");
    }
  }
  std::memset(&async_view[offset], 0xff, bytes);
  std::memset(static_cast<unsigned char*>(shared), 0xff, bytes);
  transfers.push_back({true, tensor, offset, at, {x, y, z}, thread_index(), true});
}

void tma_store(const TensorBox& tensor, const void* shared, int x, int y, int z) {
  ++counts.tma_stores;
  const uint32_t offset = offset_of(shared, box_bytes(tensor), "TMA reads");
  if (window_address(shared) % 1024 != 0) fail("TMA: a swizzled tile that is not 1024-byte aligned");
  transfers.push_back({false, tensor, offset, 0, {x, y, z}, thread_index(), false});
}

void tma_store_commit() {
  for (Transfer& transfer : transfers) transfer.committed = transfer.committed || transfer.thread == thread_index();
}

void tma_store_wait() {
  const unsigned thread = thread_index();
  wait_until("cp.async.bulk.wait_group", [thread] {
    for (const Transfer& transfer : transfers) {
      if (!transfer.load && transfer.committed && transfer.thread == thread) return false;
    }
    return true;
  });
}

void store_shared_16(void* shared, const void* value) {
  const uint32_t offset = offset_of(shared, 16, "st.shared");
  if (offset % 16 != 0) fail("st.shared.v4: not 16-byte aligned");
  PendingStore store{offset, {}};
  std::memcpy(store.value.data(), value, 16);
  std::memcpy(shared, value, 16);
  unpublished[thread_index()].push_back(store);
}

void publish_stores() {
  for (const PendingStore& store : unpublished[thread_index()]) {
    std::memcpy(&async_view[store.offset], store.value.data(), 16);
  }
  unpublished[thread_index()].clear();
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
