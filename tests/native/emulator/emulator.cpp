#include "emulator.h"

#include "async.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Settings settings;
Counts counts;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarp = 32;
constexpr size_t kCanary = 256;  // checked bytes after shared memory

struct Copy {
  void* target;
  const void* source;
  int bytes;
};

struct Fiber {
  unsigned index = 0;
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  const uint64_t* waits_for = nullptr;  // resumes when this is no longer `seen`
  uint64_t seen = 0;
  std::function<bool()> ready;  // or resumes when this returns true
  const char* waits_at = nullptr;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
  unsigned char* stack = nullptr;
};

struct Meeting {
  const char* instruction = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  void* slots[kWarp];
};

// One launch at a time; globals because fibers and signal handlers access them.
const char* kernel_name = "";
const std::function<void()>* kernel_body = nullptr;
std::vector<Fiber> fibers;
std::vector<Meeting> warps;
Meeting block_meeting;
Fiber* current = nullptr;
jmp_buf scheduler;
ucontext_t scheduler_context;
std::vector<unsigned char> shared;
unsigned char* shared_base = nullptr;
size_t shared_bytes = 0;
std::string error;
sigjmp_buf bad_access;
volatile sig_atomic_t catching = 0;
void* volatile bad_address = nullptr;
std::vector<unsigned char*> stacks;

std::string place() {
  std::string text = kernel_name;
  text += " block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
          std::to_string(blockIdx.z) + ")";
  if (current != nullptr) text += " thread " + std::to_string(current->index);
  return text;
}

void yield() {
  if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

void wait_for(const uint64_t& generation) {
  current->waits_for = &generation;
  current->seen = generation;
  yield();
}

void fiber_main() {
  try {
    (*kernel_body)();
    if (!current->uncommitted.empty()) fail("a thread ends with cp.async copies that were never committed");
  } catch (const std::exception& e) {
    if (error.empty()) error = e.what();
  }
  current->done = true;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = dim3(fiber.index, 0, 0);
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  swapcontext(&scheduler_context, &fiber.start);
}

void prepare_block(unsigned threads) {
  fibers.clear();
  fibers.resize(threads);
  while (stacks.size() < threads) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(stack));
  }
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].index = i;
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack.ss_sp = stacks[i];
    fibers[i].start.uc_stack.ss_size = kStackBytes;
    fibers[i].start.uc_link = nullptr;
    makecontext(&fibers[i].start, fiber_main, 0);
  }
  warps.assign((threads + kWarp - 1) / kWarp, Meeting{});
  block_meeting = Meeting{};
  std::memset(shared_base, 0xff, shared_bytes + kCanary);  // NaN in every floating-point type
}

std::string stuck() {
  std::string text = "threads wait for others that never come:";
  for (const Fiber& fiber : fibers) {
    if (fiber.done) continue;
    if (fiber.ready) return text + " thread " + std::to_string(fiber.index) + " at " + fiber.waits_at;
    const bool at_barrier = fiber.waits_for == &block_meeting.generation;
    const Meeting& meeting = at_barrier ? block_meeting : warps[fiber.index / kWarp];
    return text + " thread " + std::to_string(fiber.index) + " at " + meeting.instruction;
  }
  return text;
}

bool can_go_on(Fiber& fiber) {
  if (fiber.done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen)) return false;
  return !fiber.ready || fiber.ready();
}

// How often each warp is skipped: never without a seed.
std::vector<double> idleness(unsigned threads, std::mt19937_64& random) {
  std::vector<double> idle((threads + kWarp - 1) / kWarp, 0.);
  if (settings.seed == 0) return idle;
  constexpr double kChoices[] = {0., 0., .5, .9};
  for (double& chance : idle) chance = kChoices[random() % 4];
  return idle;
}

void run_block(unsigned threads, std::mt19937_64& random) {
  prepare_block(threads);
  begin_async(threads, random());
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  const std::vector<double> idle = idleness(threads, random);
  std::vector<char> passed_over(idle.size());
  std::uniform_real_distribution<double> uniform(0., 1.);
  bool hurry = false;  // no progress in the last round: skip no warp and force an asynchronous event
  for (unsigned left = threads; left > 0;) {
    if (settings.seed != 0) std::shuffle(order.begin(), order.end(), random);
    for (size_t warp = 0; warp < idle.size(); ++warp) passed_over[warp] = !hurry && uniform(random) < idle[warp];
    bool moved = step_async(hurry);
    for (const unsigned i : order) {
      Fiber& fiber = fibers[i];
      if (passed_over[i / kWarp] || !can_go_on(fiber)) continue;
      fiber.waits_for = nullptr;
      fiber.ready = nullptr;
      resume(fiber);
      moved = true;
      if (fiber.done) --left;
      if (!error.empty()) return;
    }
    if (!moved && hurry) {
      current = nullptr;
      error = place() + ": " + stuck();
      return;
    }
    hurry = !moved;
  }
  current = nullptr;
  try {
    end_async();
  } catch (const std::exception& e) {
    error = e.what();
    return;
  }
  for (size_t i = 0; i < kCanary; ++i) {
    if (shared_base[shared_bytes + i] != 0xff) {
      error = place() + ": shared memory was written behind its " + std::to_string(shared_bytes) + " bytes";
      return;
    }
  }
}

void on_bad_access(int, siginfo_t* info, void*) {
  if (!catching) _exit(139);
  bad_address = info->si_addr;
  siglongjmp(bad_access, 1);
}

// Turns SIGSEGV and SIGBUS into an error during a launch.
class AccessGuard {
 public:
  AccessGuard() {
    struct sigaction action = {};
    action.sa_sigaction = on_bad_access;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &previous_[0]);
    sigaction(SIGBUS, &action, &previous_[1]);
    catching = 1;
  }
  ~AccessGuard() {
    catching = 0;
    sigaction(SIGSEGV, &previous_[0], nullptr);
    sigaction(SIGBUS, &previous_[1], nullptr);
  }

 private:
  struct sigaction previous_[2];
};

void run_grid(unsigned threads) {
  std::mt19937_64 random(settings.seed);
  std::vector<uint64_t> blocks(static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (settings.seed != 0) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const uint64_t block : blocks) {
    blockIdx = dim3(static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                    static_cast<unsigned>(block / gridDim.x / gridDim.y));
    ++counts.blocks;
    run_block(threads, random);
    if (!error.empty()) return;
  }
}

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
size_t pages_for(size_t bytes) { return (bytes + page_size() - 1) / page_size() * page_size(); }

}  // namespace

void fail(const std::string& what) { throw std::runtime_error(place() + ": " + what); }

void run(const char* kernel, dim3 grid, unsigned threads, size_t bytes, const std::function<void()>& body) {
  kernel_name = kernel;
  kernel_body = &body;
  gridDim = grid;
  blockDim = dim3(threads);
  current = nullptr;
  error.clear();
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) throw std::runtime_error(place() + ": grid too large");
  if (threads == 0 || threads > 1024) throw std::runtime_error(place() + ": bad block size");
  if (bytes > settings.shared_limit()) {
    throw std::runtime_error(place() + ": " + std::to_string(bytes) + " bytes of shared memory");
  }
  ++counts.launches;
  shared_bytes = bytes;
  shared.resize(bytes + kCanary + 128);
  shared_base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared.data()) + 127) / 128 * 128);
  const AccessGuard guard;
  if (sigsetjmp(bad_access, 1)) {
    throw std::runtime_error(place() + ": access outside a tensor, at " +
                             std::to_string(reinterpret_cast<uintptr_t>(bad_address)));
  }
  run_grid(threads);
  if (!error.empty()) throw std::runtime_error(error);
}

void barrier() {
  ++counts.barriers;
  block_meeting.instruction = "__syncthreads";
  if (++block_meeting.arrived == static_cast<int>(fibers.size())) {
    block_meeting.arrived = 0;
    ++block_meeting.generation;
    return;
  }
  wait_for(block_meeting.generation);
}

void warp_meet(const char* instruction, void* slot, void (*combine)(void* const* slots)) {
  Meeting& warp = warps[current->index / kWarp];
  if (warp.arrived == 0) warp.instruction = instruction;
  if (std::strcmp(warp.instruction, instruction) != 0) {
    fail(std::string("lanes of a warp are at different instructions: ") + warp.instruction + " and " + instruction);
  }
  warp.slots[current->index % kWarp] = slot;
  if (++warp.arrived == kWarp) {
    combine(warp.slots);
    warp.arrived = 0;
    ++warp.generation;
    return;
  }
  wait_for(warp.generation);
}

void wait_until(const char* instruction, const std::function<bool()>& ready) {
  if (ready()) return;
  current->waits_at = instruction;
  current->ready = ready;
  yield();
}

unsigned thread_index() { return current->index; }
unsigned num_threads() { return static_cast<unsigned>(fibers.size()); }

unsigned char* shared_memory() { return shared_base; }
size_t shared_size() { return shared_bytes; }

bool in_shared_memory(const void* pointer, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  return p >= shared_base && p + bytes <= shared_base + shared_bytes;
}

void async_copy(void* target, const void* source, int bytes) {
  if (!in_shared_memory(target, 16)) fail("cp.async writes outside shared memory");
  if (reinterpret_cast<uintptr_t>(target) % 16 != 0) fail("cp.async: target is not 16-byte aligned");
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("cp.async: source is not 16-byte aligned");
  if (bytes < 0 || bytes > 16) fail("cp.async: bad size");
  ++counts.async_copies;
  std::memset(target, 0xff, 16);
  current->uncommitted.push_back({target, source, bytes});
}

void async_commit() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void async_wait(int pending) {
  while (static_cast<int>(current->groups.size()) > pending) {
    for (const Copy& copy : current->groups.front()) {
      std::memset(copy.target, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.target, copy.source, static_cast<size_t>(copy.bytes));
    }
    current->groups.pop_front();
  }
}

void* fence(size_t bytes) {
  const size_t whole = pages_for(bytes);
  auto* base = static_cast<unsigned char*>(
      mmap(nullptr, whole + page_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) throw std::bad_alloc();
  mprotect(base + whole, page_size(), PROT_NONE);
  return base + whole - (bytes + 15) / 16 * 16;
}

void unfence(void* pointer, size_t bytes) {
  const size_t whole = pages_for(bytes);
  munmap(static_cast<unsigned char*>(pointer) + (bytes + 15) / 16 * 16 - whole, whole + page_size());
}

}  // namespace emulator
