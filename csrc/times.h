// How long each operation took: calls and nanoseconds, summed. Only the door measures, with a steady clock, what a call
// costs in the core with the reading of its arguments and the making of its result. Nothing is decided by it, and it is
// in neither stats() nor the digest: ranks that make equal calls differ in it.
#pragma once

#include <chrono>
#include <cstdint>

#include "types.h"

namespace hybridcache {

enum class Operation : std::uint8_t {
  match,
  reserve,
  launch,
  plan,
  applied,
  commit,
  want,
  fork,
  close,
  pin,
  release,
  clear,
  transcript,
  extend,
  truncate,
  close_transcript,
  take_events
};
constexpr const char* kOperationNames[] = {
    "match",   "reserve", "launch",     "plan",   "applied",  "commit",           "want",       "fork", "close", "pin",
    "release", "clear",   "transcript", "extend", "truncate", "close_transcript", "take_events"};
constexpr int kOperations = sizeof(kOperationNames) / sizeof(*kOperationNames);

// Written by the one thread inside the cache, read by any.
class Times {
 public:
  using Clock = std::chrono::steady_clock;

  void add(Operation operation, Clock::duration passed) {
    auto& total = totals_[static_cast<int>(operation)];
    total.calls.add();
    total.nanoseconds.add(std::chrono::nanoseconds(passed).count());
  }
  std::int64_t calls(int operation) const { return totals_[operation].calls.get(); }
  std::int64_t nanoseconds(int operation) const { return totals_[operation].nanoseconds.get(); }

 private:
  struct Total {
    Counter calls, nanoseconds;
  };
  Total totals_[kOperations];
};

}  // namespace hybridcache
