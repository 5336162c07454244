// A session's tokens, kept by the core so that a turn costs what is new. It owns the tokens, and for each transcript
// remembers its anchor: the deepest node that the tokens match in full, with the page table of the path to it. It pins
// nothing: when a node goes, whoever is anchored there moves to the node above.
//
//   tokens   0 ........................... anchor ........ matched last time ........ end
//   table    the pages of the path to the anchor that are whole there
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "tree.h"
#include "types.h"

namespace hybridcache {

using TranscriptId = std::int64_t;

struct Transcript {
  TranscriptId id = 0;
  std::string salt;
  std::vector<Token> tokens;  // with content ids, which it holds
  bool has_content = false;
  Node* anchor = nullptr;  // null: nothing is known of it
  std::vector<PageId> table;
};

class Transcripts : public NodeWatcher {
 public:
  Transcripts(const Paging& paging, Tree& tree, ContentTable& contents)
      : paging_(paging), tree_(tree), contents_(contents) {
    tree.watch_nodes(this);
  }

  TranscriptId open(const std::string& salt);
  void close(TranscriptId id);
  Transcript& at(TranscriptId id) const;  // StateError if it is closed
  // Content keys name absolute positions of what is appended, ascending.
  void extend(Transcript& transcript, std::span<const Token> tokens, std::span<const ContentKey> keys);
  void truncate(Transcript& transcript, Position length);
  std::vector<Token> plain_tokens(const Transcript& transcript) const;

  // As Tree::walk over all of its tokens, but from the anchor on; moves the anchor to where that ends.
  Walk walk(Transcript& transcript, Position limit);
  void going(Node& node) override;

  const std::map<TranscriptId, std::unique_ptr<Transcript>>& all() const { return all_; }
  std::int64_t count() const { return count_.get(); }
  bool anchors(const Node* node, const Transcript& transcript) const;

 private:
  void move_down(Transcript& transcript, Node* last);
  void move_up(Transcript& transcript, Node* node);
  void leave(Transcript& transcript);
  void settle_at(Transcript& transcript, Node* node);

  const Paging& paging_;
  Tree& tree_;
  ContentTable& contents_;
  std::map<TranscriptId, std::unique_ptr<Transcript>> all_;
  std::unordered_map<const Node*, std::vector<Transcript*>> anchored_;  // looked up, never walked
  TranscriptId next_ = 1;
  Counter count_;
};

}  // namespace hybridcache
