// The journal: what joined and left the tree, in order, as plain values, for whoever mirrors it elsewhere. It is told
// by the tree, changes nothing and decides nothing; it does not enter the digest. A split or a merge of nodes changes
// nothing that the tree holds, so it is no event.
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
  Journal(const Paging& paging, const Tree& tree, const ContentTable& contents)
      : paging_(paging), tree_(tree), contents_(contents) {}

  void pages_joined(const Node& leaf) override;
  void pages_leaving(const Node& leaf) override;
  void checkpoint_joined(const Node& node) override;
  void checkpoint_leaving(const Node& node) override;

  std::size_t size() const { return events_.size(); }
  // What was recorded since `size` was `before` has left nothing in the tree: one event says so.
  void cleared(std::size_t before);
  std::vector<Event> take() { return std::exchange(events_, {}); }

 private:
  void add_path(Event& event, const Node* node, Position begin, Position end);

  const Paging paging_;
  const Tree& tree_;
  const ContentTable& contents_;
  std::vector<Event> events_;
};

}  // namespace hybridcache
