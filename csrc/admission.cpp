#include "admission.h"

#include <iterator>
#include <map>
#include <set>

namespace hybridcache {

bool Admission::make_room(const Need& need, Cause why) {
  return feasible(need) && evict_until(need, Eviction::kAny, why);
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

// Whether enough would leave if everything unpinned did. Each unpinned checkpoint gives a slot, and in the unified
// arena with it the slab; what is missing then is counted among the pages that would leave, until it is found. A
// refusal has counted fewer than were asked for.
bool Admission::feasible(const Need& need) const {
  if (arena_.satisfies(need.slots, need.pages)) return true;
  const auto unpinned = eviction_.unpinned();
  const auto slabs = need.slots - arena_.free_slots() - unpinned;
  const auto pages = need.pages - arena_.free_pages(need.slots - unpinned);
  if (slabs <= 0) return pages_can_leave(pages);
  return !arena_.fixed() && slabs_can_empty(slabs, pages);
}

// The pages that leave with the node: all but a first one that a pinned checkpoint above is cut in.
std::span<const PageId> Admission::leaving(const Node& node) const {
  const bool stays = !node.pages.empty() && arena_.use(node.pages.front()).pinned_tails > 0;
  return std::span(node.pages).subspan(stays);
}

bool Admission::pages_can_leave(std::int64_t pages) const {
  pages -= arena_.loose_pages();
  if (pages > 0) {
    eviction_.each_leaving([&](const Node& node) {
      pages -= std::ssize(leaving(node));
      return pages > 0;
    });
  }
  return pages <= 0;
}

// More slots are wanted than there are unpinned checkpoints: slabs have to become empty that pages are in. Looks at all
// pages that would leave, if it has to.
bool Admission::slabs_can_empty(std::int64_t slabs, std::int64_t pages) const {
  std::map<std::int32_t, std::int64_t> left;
  std::set<PageId> tails;
  const auto leave = [&](PageId page) {
    --pages;
    const auto slab = arena_.slab_of(page);
    if (++left[slab] == arena_.used(slab)) --slabs;
  };
  for (const auto& [key, node] : eviction_.order().entries()) {
    const PageId tail = node->checkpoint->tail;
    if (tail != kNone && arena_.use(tail).loose() && tails.insert(tail).second) leave(tail);
  }
  eviction_.each_leaving([&](const Node& node) {
    for (const PageId page : leaving(node)) leave(page);
    return slabs > 0 || pages > 0;
  });
  return slabs <= 0 && pages <= 0;
}

}  // namespace hybridcache
