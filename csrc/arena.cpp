#include "arena.h"

#include <algorithm>
#include <functional>

namespace hybridcache {

namespace {
enum Event : std::uint64_t { kTakeSlot = 1, kFreeSlot, kTakePage, kFreePage };

std::int64_t page_slab_count(const Options& options, std::int64_t pages_per_slab) {
  return options.num_slabs > 0 ? options.num_slabs : ceil_div(options.num_pages, pages_per_slab);
}
}  // namespace

Arena::Arena(const Options& options, Digest& digest)
    : fixed_(options.num_slabs == 0),
      pages_per_slab_(ceil_div(options.slot_bytes, options.page_bytes)),
      digest_(digest) {
  const auto slabs = page_slab_count(options, pages_per_slab_);
  const auto pages = fixed_ ? options.num_pages : slabs * pages_per_slab_;
  const auto slots = fixed_ ? options.num_slots : slabs;
  free_slabs_ = IdSet(slabs);
  for (std::int64_t slab = 0; slab < slabs; ++slab) {
    slabs_.push_back({std::min(pages_per_slab_, pages - slab * pages_per_slab_)});
    free_slabs_.insert(slab);
  }
  if (fixed_) {
    free_slots_ = IdSet(slots);
    for (std::int64_t slot = 0; slot < slots; ++slot) free_slots_.insert(slot);
  }
  slot_taken_.assign(slots, false);
  dirty_.assign(pages, true);
  uses_.assign(pages, {});
}

SlotId Arena::take_slot() {
  auto& from = fixed_ ? free_slots_ : free_slabs_;
  ensure(!from.empty(), "take_slot without a free slot");
  const SlotId slot = from.first();
  from.erase(slot);
  slot_taken_[slot] = true;
  if (!fixed_) {
    const auto first = slot * pages_per_slab_;
    std::fill(dirty_.begin() + first, dirty_.begin() + first + pages_per_slab_, true);
  }
  taken_slots_.add();
  digest_.mix(kTakeSlot, slot);
  return slot;
}

void Arena::free_slot(SlotId slot) {
  ensure(slot_taken_[slot], "free_slot of a free slot");
  slot_taken_[slot] = false;
  (fixed_ ? free_slots_ : free_slabs_).insert(slot);
  taken_slots_.add(-1);
  digest_.mix(kFreeSlot, slot);
}

std::int32_t Arena::choose_slab(std::int32_t home) const {
  if (home != kNone && has_free_page(home)) return home;
  if (!partial_.empty()) return partial_.begin()->second;
  ensure(!free_slabs_.empty(), "take_page without a free page");
  return free_slabs_.first();
}

PageId Arena::lowest_free_page(std::int32_t slab) const {
  const auto first = uses_.begin() + slab * pages_per_slab_;
  const auto free = std::find_if_not(first, first + slabs_[slab].capacity, std::mem_fn(&PageUse::taken));
  return static_cast<PageId>(free - uses_.begin());
}

// Moves a slab between free, partly used and full as its count of taken pages changes.
void Arena::set_used(std::int32_t slab, std::int64_t used) {
  auto& s = slabs_[slab];
  decltype(partial_)::node_type entry;  // of the set, to be used again
  if (has_free_page(slab)) {
    entry = partial_.extract({-s.used, slab});
  } else if (s.used == 0) {
    free_slabs_.erase(slab);
  }
  slabs_with_pages_.add((used > 0) - (s.used > 0));
  s.used = used;
  if (has_free_page(slab)) {
    if (entry.empty()) {
      partial_.insert({-used, slab});
    } else {
      entry.value() = {-used, slab};
      partial_.insert(std::move(entry));
    }
  } else if (used == 0) {
    free_slabs_.insert(slab);
  }
}

PageId Arena::take_page(std::int32_t& home) {
  home = choose_slab(home);
  const PageId page = lowest_free_page(home);
  uses_[page].held = true;
  set_used(home, slabs_[home].used + 1);
  taken_pages_.add();
  digest_.mix(kTakePage, page);
  return page;
}

// Counts the page anew after `change`, and frees it when nobody uses it any more.
template <class Change>
void Arena::change_use(PageId page, Change&& change) {
  PageUse& use = uses_[page];
  const PageUse before = use;
  change(use);
  tree_pages_.add(use.of_tree() - before.of_tree());
  loose_pages_.add(use.loose() - before.loose());
  if (use.taken()) return;
  const auto slab = slab_of(page);
  set_used(slab, slabs_[slab].used - 1);
  taken_pages_.add(-1);
  digest_.mix(kFreePage, page);
}

void Arena::release_page(PageId page) {
  ensure(uses_[page].held, "release_page of a page that no lease holds");
  change_use(page, [](PageUse& use) { use.held = false; });
}

void Arena::join_node(PageId page) {
  ensure(uses_[page].held, "join_node of a page that no lease holds");
  change_use(page, [](PageUse& use) {
    use.node = true;
    use.held = false;
  });
}

void Arena::leave_node(PageId page) {
  ensure(uses_[page].node, "leave_node of a page that is no node's");
  change_use(page, [](PageUse& use) { use.node = false; });
}

void Arena::add_tail(PageId page) {
  ensure(uses_[page].taken(), "add_tail of a free page");
  change_use(page, [](PageUse& use) { ++use.tails; });
}

void Arena::drop_tail(PageId page) {
  ensure(uses_[page].tails > uses_[page].pinned_tails, "drop_tail of a page that is no tail, or only of pinned ones");
  change_use(page, [](PageUse& use) { --use.tails; });
}

void Arena::pin_tail(PageId page) {
  ensure(uses_[page].pinned_tails < uses_[page].tails, "pin_tail of a page that is no tail");
  change_use(page, [](PageUse& use) { ++use.pinned_tails; });
}

void Arena::unpin_tail(PageId page) {
  ensure(uses_[page].pinned_tails > 0, "unpin_tail of a page that is no pinned tail");
  change_use(page, [](PageUse& use) { --use.pinned_tails; });
}

std::int64_t Arena::free_pages(std::int64_t slots) const {
  const auto outside_slots = num_pages() - (fixed_ ? 0 : (taken_slots() + slots) * pages_per_slab_);
  return outside_slots - taken_pages();
}

bool Arena::satisfies(std::int64_t slots, std::int64_t pages) const {
  return free_slots() >= slots && free_pages(slots) >= pages;
}

bool Arena::could_ever_satisfy(std::int64_t slots, std::int64_t pages) const {
  if (fixed_) return num_slots() >= slots && num_pages() >= pages;
  return num_slots() >= slots && (num_slots() - slots) * pages_per_slab_ >= pages;
}

}  // namespace hybridcache
