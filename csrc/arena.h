// The arena: which pages and slots are taken, and which slab plays which role. It knows bytes and ids, no tokens.
//
//   unified   | slab 0      | slab 1      | slab 2      |   a slab is free, one slot, or pages_per_slab pages;
//             | p0 p1 p2 p3 | slot 1      | p8 p9       |   slot s is slab s, page p lies in p / pages_per_slab
//
//   fixed     | p0 p1 p2 p3 p4 p5 | slot 0 | slot 1 |       two regions, roles never change, the same packing
//
// Every choice takes the lowest id among equals, so equal calls give equal ids (I7). A page is dirty until it has been
// zeroed or wholly overwritten; a slab that was a slot gives dirty pages, so that state bytes are never read as KV.
#pragma once

#include <set>
#include <utility>
#include <vector>

#include "id_set.h"
#include "types.h"

namespace hybridcache {

// Who uses a page.
struct PageUse {
  std::uint64_t held : 1 = 0;           // by the lease that took it
  std::uint64_t node : 1 = 0;           // a node's
  std::uint64_t tails : 31 = 0;         // checkpoints whose boundary cuts it
  std::uint64_t pinned_tails : 31 = 0;  // of these, pinned ones

  bool of_tree() const { return node || tails > 0; }
  bool taken() const { return held || of_tree(); }
  // It leaves with the checkpoints that it is the tail of, and they may.
  bool loose() const { return tails > 0 && pinned_tails == 0 && !node && !held; }
};

class Arena {
 public:
  Arena(const Options& options, Digest& digest);

  // REQUIRES: free_slots() > 0.
  SlotId take_slot();
  void free_slot(SlotId slot);

  // `home` is the slab of the lease's last page (kNone at first); it is left at the slab of the new page.
  // REQUIRES: a free page or slab.
  PageId take_page(std::int32_t& home);

  // A page that was taken is held by its lease until it is released, or joins the tree as a node's.
  void release_page(PageId page);
  void join_node(PageId page);
  // Pages of the tree are a node's, the tail of checkpoints, or both. A page is free when it is none of these and not
  // held; held and a tail, the lease that wrote it goes on in it.
  void leave_node(PageId page);
  void add_tail(PageId page);
  void drop_tail(PageId page);
  // The tail of a checkpoint that is pinned stays, whatever else leaves.
  void pin_tail(PageId page);
  void unpin_tail(PageId page);

  bool dirty(PageId page) const { return dirty_[page]; }
  void clean(PageId page) { dirty_[page] = false; }

  // Pages that could be taken now if `slots` slots were taken first.
  std::int64_t free_pages(std::int64_t slots = 0) const;
  // Whether `slots` and `pages` more can be taken now.
  bool satisfies(std::int64_t slots, std::int64_t pages) const;
  // Whether an arena with nothing in it could give them.
  bool could_ever_satisfy(std::int64_t slots, std::int64_t pages) const;

  bool fixed() const { return fixed_; }
  std::int64_t pages_per_slab() const { return pages_per_slab_; }
  std::int64_t page_slabs() const { return static_cast<std::int64_t>(slabs_.size()); }
  std::int64_t num_pages() const { return static_cast<std::int64_t>(uses_.size()); }
  std::int64_t num_slots() const { return static_cast<std::int64_t>(slot_taken_.size()); }
  // All of it, in pages: slots of the fixed arena are memory of their own, else they are the pages'.
  std::int64_t size_in_pages() const { return num_pages() + (fixed_ ? num_slots() * pages_per_slab_ : 0); }
  std::int64_t free_slots() const { return fixed_ ? free_slots_.size() : free_slabs_.size(); }
  std::int64_t free_slabs() const { return free_slabs_.size(); }
  std::int64_t capacity(std::int32_t slab) const { return slabs_[slab].capacity; }
  std::int32_t slab_of(PageId page) const { return static_cast<std::int32_t>(page / pages_per_slab_); }
  std::int64_t used(std::int32_t slab) const { return slabs_[slab].used; }
  // check(): is this slot, or this slab, among the free ones?
  bool free_slot_known(SlotId slot) const { return free_slots_.holds(slot); }  // fixed arena
  bool free_slab_known(std::int32_t slab) const { return free_slabs_.holds(slab); }
  bool slot_taken(SlotId slot) const { return slot_taken_[slot]; }
  const PageUse& use(PageId page) const { return uses_[page]; }

  std::int64_t taken_pages() const { return taken_pages_.get(); }
  std::int64_t taken_slots() const { return taken_slots_.get(); }
  std::int64_t tree_pages() const { return tree_pages_.get(); }
  std::int64_t loose_pages() const { return loose_pages_.get(); }
  std::int64_t slabs_with_pages() const { return slabs_with_pages_.get(); }

 private:
  struct Slab {
    std::int64_t capacity;  // pages
    std::int64_t used = 0;  // pages taken
  };

  std::int32_t choose_slab(std::int32_t home) const;
  PageId lowest_free_page(std::int32_t slab) const;
  template <class Change>
  void change_use(PageId page, Change&& change);
  void set_used(std::int32_t slab, std::int64_t used);
  bool has_free_page(std::int32_t slab) const {
    return slabs_[slab].used > 0 && slabs_[slab].used < slabs_[slab].capacity;
  }

  const bool fixed_;
  const std::int64_t pages_per_slab_;
  Digest& digest_;
  std::vector<Slab> slabs_;                                  // slabs that may hold pages
  IdSet free_slabs_;                                         // no page, no slot
  IdSet free_slots_;                                         // fixed arena only
  std::set<std::pair<std::int64_t, std::int32_t>> partial_;  // (-used, slab): the fullest partly used slab first
  std::vector<bool> slot_taken_;
  std::vector<bool> dirty_;
  std::vector<PageUse> uses_;
  Counter taken_pages_, taken_slots_, tree_pages_, loose_pages_, slabs_with_pages_;
};

}  // namespace hybridcache
