// Shared by the parts of the asynchronous machinery: async.cpp schedules, tma.cpp has mbarriers, copies and the async
// proxy's stores, wgmma.cpp the warpgroups' products, their registers, and named barriers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

extern std::vector<unsigned char> async_view;  // shared memory as TMA and wgmma see it

uint64_t draw();
bool chance(double p);

uint32_t offset_of(const void* pointer, size_t bytes, const char* what);  // in shared memory

// Window addresses: the start of shared memory, the swizzled address, and an address's offset in shared memory.
uint32_t window_start();
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7u) << 4); }
uint32_t inside(uint32_t address, size_t bytes, const char* what);

// Implement begin_async, step_async and end_async.
void begin_tma(unsigned threads);
bool step_tma(bool now, double copy_chance);
void end_tma();
void begin_wgmma(unsigned threads);
bool step_wgmma(bool now, double product_chance);
void end_wgmma();

}  // namespace emulator
