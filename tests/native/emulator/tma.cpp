#include <array>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "async.h"
#include "async_state.h"
#include "emulator.h"

namespace emulator {

namespace {

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

struct PendingStore {
  uint32_t offset;
  std::array<unsigned char, 16> value;
};

std::map<uint32_t, BarrierState> barriers;
std::vector<Transfer> transfers;
std::vector<std::vector<PendingStore>> unpublished;  // by thread

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

// Calls visit(offset in shared memory, element in global memory or null if out of bounds) for each element of a box.
template <class Visit>
void for_box(const Transfer& t, const Visit& visit) {
  const TensorBox& tensor = t.tensor;
  int index[3];
  uint32_t linear = window_start() + t.shared;
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

}  // namespace

void begin_tma(unsigned threads) {
  barriers.clear();
  transfers.clear();
  unpublished.assign(threads, {});
}

bool step_tma(bool now, double copy_chance) {
  bool happened = false;
  for (size_t i = 0; i < transfers.size();) {
    if (!transfers[i].committed || !(now || chance(copy_chance))) {
      ++i;
      continue;
    }
    const size_t chosen = settings.seed == 0 ? i : i + draw() % (transfers.size() - i);
    if (!transfers[chosen].committed) {
      ++i;
      continue;
    }
    const Transfer transfer = transfers[chosen];
    transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(chosen));
    complete(transfer);
    happened = true;
  }
  return happened;
}

void end_tma() {
  if (!transfers.empty()) fail("a block ends with TMA copies in flight");
  for (const auto& stores : unpublished) {
    if (!stores.empty()) fail("a block ends with stores for the async proxy that were never fenced");
  }
  for (const auto& [offset, barrier] : barriers) {
    if (barrier.bytes != 0) fail("an mbarrier expected other bytes than were copied");
  }
}

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

}  // namespace emulator
