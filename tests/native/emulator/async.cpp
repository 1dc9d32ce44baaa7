#include "async.h"

#include <random>
#include <string>

#include "async_state.h"
#include "emulator.h"

namespace emulator {

namespace {

constexpr uint32_t kReserved = 1024;  // of the window, reserved by the system

std::mt19937_64 source;
double copy_chance = 1., product_chance = 0.;
uint32_t window_offset = 0;

}  // namespace

std::vector<unsigned char> async_view;

uint64_t draw() { return source(); }

bool chance(double p) { return std::uniform_real_distribution<double>(0., 1.)(source) < p; }

uint32_t offset_of(const void* pointer, size_t bytes, const char* what) {
  if (!in_shared_memory(pointer, bytes)) fail(std::string(what) + " outside shared memory");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_memory());
}

uint32_t window_start() { return kReserved + window_offset; }

uint32_t window_address(const void* pointer) { return window_start() + offset_of(pointer, 0, "address"); }

uint32_t inside(uint32_t address, size_t bytes, const char* what) {
  const uint32_t start = window_start();
  if (address < start || address - start + bytes > shared_size()) fail(std::string(what) + " outside shared memory");
  return address - start;
}

void begin_async(unsigned threads, uint64_t seed) {
  source.seed(seed);
  constexpr double kCopy[] = {1., .3, .05}, kProduct[] = {1., .2, 0.};
  copy_chance = settings.seed == 0 ? 1. : kCopy[source() % 3];
  product_chance = settings.seed == 0 ? 0. : kProduct[source() % 3];
  window_offset = static_cast<uint32_t>(128 * (settings.seed == 0 ? 0 : source() % 8));
  async_view.assign(shared_size(), 0xff);
  begin_tma(threads);
  begin_wgmma(threads);
}

bool step_async(bool now) {
  const bool copied = step_tma(now, copy_chance), multiplied = step_wgmma(now, product_chance);
  return copied || multiplied;
}

void end_async() {
  end_tma();
  end_wgmma();
}

}  // namespace emulator
