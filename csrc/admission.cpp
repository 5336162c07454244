#include "admission.h"

#include <algorithm>

namespace hybridcache {

bool Admission::make_room(const Need& need, const Node* held, Cause why) {
  return feasible(need, held) && evict_until(need, Eviction::kAny, why);
}

bool Admission::make_room_for(Kind kind, bool spare) {
  return evict_until({1, 0}, spare ? Eviction::kNothing : eviction_.limit(kind), Cause::checkpoint);
}

bool Admission::has_room_for(Kind kind) const {
  return arena_.satisfies(1, 0) || eviction_.lowest(eviction_.limit(kind), false) != nullptr;
}

bool Admission::evict_until(const Need& need, Worth limit, Cause why) {
  while (!arena_.satisfies(need.slots, need.pages)) {
    const bool only_pages = arena_.fixed() && arena_.free_slots() >= need.slots;
    Node* node = eviction_.lowest(limit, only_pages);
    if (node == nullptr) return false;
    eviction_.evict(node, why);
  }
  return true;
}

// Each unpinned checkpoint gives one slot, and in the unified arena a whole slab; in the fixed one all pages are free
// that nobody can have pinned. Mostly that alone decides.
bool Admission::feasible(const Need& need, const Node* held) const {
  if (arena_.satisfies(need.slots, need.pages)) return true;
  const auto unpinned = eviction_.unpinned();
  if (arena_.fixed() && arena_.free_slots() + unpinned < need.slots) return false;
  if (arena_.fixed() && arena_.num_pages() - most_pinned_pages_(held) >= need.pages) return true;
  if (!arena_.fixed() && arena_.free_pages(need.slots - unpinned) >= need.pages &&
      arena_.free_slots() + unpinned >= need.slots)
    return true;
  return feasible_exactly(need, held);
}

// What would be free if everything unpinned left: the pages that nobody pins, and the slabs that hold none that
// somebody does.
bool Admission::feasible_exactly(const Need& need, const Node* held) const {
  std::vector<bool> pinned(arena_.num_pages(), false);
  std::vector<std::int64_t> in_slab(arena_.page_slabs(), 0);
  std::int64_t pages = 0;
  const auto mark = [&](PageId page) {
    if (pinned[page]) return;
    pinned[page] = true;
    ++in_slab[arena_.slab_of(page)];
    ++pages;
  };
  each_pinned_page_(mark, held);
  if (arena_.fixed()) return arena_.num_pages() - pages >= need.pages;
  const auto page_slabs = std::count_if(in_slab.begin(), in_slab.end(), [](auto count) { return count > 0; });
  const auto pinned_slots = arena_.taken_slots() - eviction_.unpinned();
  const auto free_slabs = arena_.num_slots() - pinned_slots - page_slabs - need.slots;
  return free_slabs >= 0 && (free_slabs + page_slabs) * arena_.pages_per_slab() - pages >= need.pages;
}

}  // namespace hybridcache
