// The door: one thread at a time in the cache, no way back in from a callback, and none after a change that broke off
// half-way, since what is then in the cache must not be served. It also measures how long each operation took.
#pragma once

#include <atomic>
#include <stdexcept>

#include "times.h"
#include "types.h"

namespace hybridcache {

struct Lock {
  std::atomic_flag busy;
  bool broken = false;
  Times times;
};

// In the cache from here to the end of the scope.
class Door {
 public:
  // To look at something; not an operation.
  explicit Door(Lock& lock) : lock_(lock) {
    if (lock_.busy.test_and_set())
      throw ConcurrencyError("cache: another call is inside, expected one thread at a time");
    if (!lock_.broken) return;
    lock_.busy.clear();
    throw InvariantError(
        "cache: an earlier call broke off in the middle of a change; expected a new cache in its place");
  }
  Door(const Door&) = delete;
  ~Door() { lock_.busy.clear(); }

  // Runs a call that changes the cache. A caller's mistake is raised before anything changed; whatever else is raised
  // (out of memory, a broken invariant) leaves the cache closed to all further calls.
  template <class Call>
  auto change(Call call) {
    try {
      return call();
    } catch (const std::invalid_argument&) {
      throw;
    } catch (const StateError&) {
      throw;
    } catch (...) {
      lock_.broken = true;
      throw;
    }
  }

 protected:
  Lock& lock_;
};

// The same for an operation, which is timed: also one that is refused.
class TimedDoor : public Door {
 public:
  TimedDoor(Lock& lock, Operation operation) : Door(lock), operation_(operation), begin_(Times::Clock::now()) {}
  ~TimedDoor() { lock_.times.add(operation_, Times::Clock::now() - begin_); }

 private:
  const Operation operation_;
  const Times::Clock::time_point begin_;
};

}  // namespace hybridcache
