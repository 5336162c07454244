// The journal: what joined and left the tree, in order, as plain values, for whoever mirrors it elsewhere. It is told
// by the tree, changes nothing and decides nothing; it does not enter the digest. A split or a merge of nodes changes
// nothing that the tree holds, so it is no event.
//
// It is bounded: when what nobody took has grown beyond the capacity, all of it is dropped and nothing more is written
// down; the next reader is told to forget everything, and then all that the tree holds.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "tree.h"
#include "types.h"

namespace hybridcache {

struct Event {
  enum class What : std::uint8_t { pages_stored, pages_removed, checkpoint_stored, checkpoint_removed, cleared };

  What what;
  std::string salt = {};
  PageId before = kNone;  // the page of the path that ends where `tokens` begin
  std::vector<PageId> pages = {};
  SlotId slot = kNone;                    // names a checkpoint as long as it stays
  Position position = 0;                  // of the checkpoint
  std::vector<Token> tokens = {};         // plain ids: of the pages; of a checkpoint those beyond `before`
  std::vector<ContentKey> contents = {};  // of these tokens, by index in them
};

class Journal : public HoldingsWatcher {
 public:
  // `capacity`: in ids, those of tokens, pages and slots.
  Journal(const Paging& paging, const Tree& tree, const ContentTable& contents, std::int64_t capacity)
      : paging_(paging), tree_(tree), contents_(contents), capacity_(capacity) {}

  void pages_joined(const Node& leaf) override;
  void pages_leaving(const Node& leaf) override;
  void checkpoint_joined(const Node& node) override;
  void checkpoint_leaving(const Node& node) override;

  std::size_t size() const { return events_.size(); }
  // What was recorded since `size` was `before` has left nothing in the tree: one event says so.
  void cleared(std::size_t before);
  // What happened since they were dropped last. O(1), but after an overflow O(what the tree holds).
  const std::vector<Event>& events();
  void drop();

 private:
  Event pages_of(const Node& node) const;
  Event checkpoint_of(const Node& node) const;
  void add_path(Event& event, const Node* node, Position begin, Position end) const;
  void record(Event event);
  void forget_from(std::size_t size);
  void announce_all();

  const Paging paging_;
  const Tree& tree_;
  const ContentTable& contents_;
  const std::int64_t capacity_;
  std::vector<Event> events_;
  std::int64_t ids_ = 0;     // in them
  bool overflowed_ = false;  // they are not all that happened
};

}  // namespace hybridcache
