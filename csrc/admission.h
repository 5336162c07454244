// Making room: whether pages and slots can be had, and what leaves for them. A request may take everything unpinned,
// and is refused only when that would not do; a checkpoint is optional and takes what is worth less.
#pragma once

#include <span>

#include "arena.h"
#include "eviction.h"

namespace hybridcache {

struct Need {
  std::int64_t slots = 0;
  std::int64_t pages = 0;
};

class Admission {
 public:
  Admission(Arena& arena, Eviction& eviction) : arena_(arena), eviction_(eviction) {}

  // All or nothing: evicts in order until `need` is there; false, and nothing changed, if evicting everything unpinned
  // would not do. What the caller is about to resume from is pinned by then: its own hit is no room.
  bool make_room(const Need& need, Cause why);
  // Whether make_room(need) would succeed; slots = -1 asks as if one more slot were free.
  bool feasible(const Need& need) const;
  // A slot for a boundary: evicts only what `kind` may replace, nothing if it is to be made in spare room only.
  bool make_room_for(Kind kind, bool spare);
  // Whether a slot could be had for a boundary of such a kind.
  bool has_room_for(Kind kind) const;

 private:
  std::span<const PageId> leaving(const Node& node) const;
  bool pages_can_leave(std::int64_t pages) const;
  bool slabs_can_empty(std::int64_t slabs, std::int64_t pages) const;
  bool evict_until(const Need& need, Worth limit, Cause why);

  Arena& arena_;
  Eviction& eviction_;
};

}  // namespace hybridcache
