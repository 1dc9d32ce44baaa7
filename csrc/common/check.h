// Argument checks at the core's boundary. User errors are caught in Python, which names the argument.
#pragma once

#include <sstream>
#include <stdexcept>

namespace mmk {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace mmk

#define MMK_CHECK(condition, ...)                                   \
  do {                                                              \
    if (!(condition)) ::mmk::fail("mmkernels core: ", __VA_ARGS__); \
  } while (0)
