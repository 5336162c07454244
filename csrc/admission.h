// Making room: whether pages and slots can be had, and what leaves for them. A request may take everything unpinned,
// and is refused only when that would not do; a checkpoint is optional and takes what is worth less.
#pragma once

#include <functional>
#include <vector>

#include "arena.h"
#include "eviction.h"

namespace hybridcache {

struct Need {
  std::int64_t slots = 0;
  std::int64_t pages = 0;
};

class Admission {
 public:
  // Calls its first argument with every page that a lease, a pin or `held` holds, possibly more than once.
  using EachPinnedPage = std::function<void(const std::function<void(PageId)>&, const Node* held)>;
  // No fewer than it calls it with, each page counted once: a bound that takes no look at any page.
  using MostPinnedPages = std::function<std::int64_t(const Node* held)>;

  Admission(Arena& arena, Eviction& eviction, EachPinnedPage each_pinned_page, MostPinnedPages most_pinned_pages)
      : arena_(arena),
        eviction_(eviction),
        each_pinned_page_(std::move(each_pinned_page)),
        most_pinned_pages_(std::move(most_pinned_pages)) {}

  // All or nothing: evicts in order until `need` is there; false, and nothing changed, if evicting everything unpinned
  // would not do. `held` is what the caller itself has pinned so far and nobody else knows of: its own hit is no room.
  bool make_room(const Need& need, const Node* held, Cause why);
  // Whether make_room(need) would succeed; slots = -1 asks as if one more slot were free.
  bool feasible(const Need& need, const Node* held) const;
  // A slot for a boundary: evicts only what `kind` may replace, nothing if it is to be made in spare room only.
  bool make_room_for(Kind kind, bool spare);
  // Whether a slot could be had for a boundary of such a kind.
  bool has_room_for(Kind kind) const;

 private:
  bool feasible_exactly(const Need& need, const Node* held) const;
  bool evict_until(const Need& need, Worth limit, Cause why);

  Arena& arena_;
  Eviction& eviction_;
  EachPinnedPage each_pinned_page_;
  MostPinnedPages most_pinned_pages_;
};

}  // namespace hybridcache
