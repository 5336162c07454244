// The tree: what is known, per salt. It owns the edges, the pages of committed tokens and the checkpoints; it decides
// nothing.
//
//     root                     A node owns, as members that die with it: its edge of tokens,
//      |                       the pages that become whole on that edge, and at most one
//     [0, 5) *                 checkpoint (*: slot, tail page, kind), at exactly its end.
//      |       |
//     [5, 9)  [5, 7) *         split [5, 9) at 7:    [5, 9)  ->  [5, 7)
//              |                                                  |
//             [7, 64) *                                          [7, 9)  keeps its identity
//
// The shape is a function of the content: a node other than a root exists if and only if it has a checkpoint, a pin, or
// at least two children. settle() restores that after a pin or a checkpoint has gone: it prunes what is childless and
// merges what has one child, and KV without a support leaves with it.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "arena.h"
#include "edge.h"
#include "types.h"

namespace hybridcache {

struct Record;

struct Checkpoint {
  Position position;  // that its state was taken at; equal to the depth of its node (I2)
  SlotId slot;
  PageId tail;  // the page that the boundary cuts, kNone on a page edge
  Kind kind;
  bool superseded = false;
  std::uint64_t tick = 0;    // last touch or publication; unique
  int pins = 0;              // leases that still read it, and Pins
  Record* record = nullptr;  // its history, if one is kept
  std::uint64_t uses = 0;    // restores
  // Kept by the order of eviction:
  std::int32_t in_order = -1, in_leaves = -1;  // its places in heap.h
  std::uint64_t base = 0, based_on = 0;        // GDSF: the inflation at the touch of that tick
};

struct Node {
  Node* parent = nullptr;  // null in a root
  Edge edge;
  Position depth = 0;                             // position of the end of the edge
  std::vector<PageId> pages;                      // numbers whole(begin()) .. whole(depth) - 1
  std::vector<std::pair<Token, Node*>> children;  // sorted by the first token of the edge
  std::optional<Checkpoint> checkpoint;
  int pins = 0;                       // anchors of leases, and Pins
  bool followed = false;              // transcripts are anchored here
  bool has_content = false;           // the edge may hold (token, content) pairs
  const std::string* salt = nullptr;  // in a root

  Position begin() const { return depth - static_cast<Position>(edge.size()); }
};

// Is told of every change that the order of eviction depends on: pins, rank, tick, and whether the node is a leaf.
class CheckpointWatcher {
 public:
  virtual ~CheckpointWatcher() = default;
  virtual void joined(Node& node) = 0;                  // node has got a checkpoint
  virtual void changed(Node& node) = 0;                 // what is told of its checkpoint has changed
  virtual void leaving(Node& node, Cause why) = 0;      // its checkpoint is about to go
  virtual void left(Node& node) = 0;                    // its checkpoint has gone
  virtual void splitting(Node& node, Position at) = 0;  // its node is about to keep only what lies beyond `at`
};

// Is told before a node goes that is `followed`.
class NodeWatcher {
 public:
  virtual ~NodeWatcher() = default;
  virtual void going(Node& node) = 0;
};

// Is told what the tree holds, if anyone asks. A split or a merge changes none of it.
class HoldingsWatcher {
 public:
  virtual ~HoldingsWatcher() = default;
  virtual void pages_joined(const Node& leaf) = 0;        // those of a new leaf
  virtual void pages_leaving(const Node& leaf) = 0;       // those of a leaf that is about to go
  virtual void checkpoint_joined(const Node& node) = 0;   // node has got a checkpoint
  virtual void checkpoint_leaving(const Node& node) = 0;  // its checkpoint is about to go
};

// Equal token ids with different content are different tokens: each (token, content) pair in use has a negative number.
class ContentTable {
 public:
  static constexpr Token kUnknown = INT32_MIN;  // equals nothing in the tree
  Token find(Token token, const std::string& content) const;
  Token acquire(Token token, const std::string& content);
  void acquire(std::span<const Token> tokens);  // once for each negative token
  void release(std::span<const Token> tokens);
  void release(TokenRange tokens);
  std::size_t size() const { return ids_.size(); }
  Token token(Token negative) const { return entries_[slot(negative)].key->first; }
  const std::string& content(Token negative) const { return entries_[slot(negative)].key->second; }
  std::int64_t users(Token negative) const { return entries_[slot(negative)].users; }

 private:
  using Key = std::pair<Token, std::string>;
  struct Entry {
    const Key* key;
    std::int64_t users;
  };
  static std::size_t slot(Token negative) { return static_cast<std::size_t>(-(negative + 1)); }
  std::map<Key, Token> ids_;
  std::vector<Entry> entries_;
  std::vector<Token> free_;
};

// What a lease gives to the tree: its page table from position 0, which entries are its own (cleared as they become the
// tree's), and whether its tokens may hold (token, content) pairs.
struct LeasePages {
  std::span<const PageId> table;
  std::vector<bool>& owned;
  bool has_content;
};

struct Walk {
  Position matched = 0;            // leading tokens that the tree knows
  std::int64_t ways = 0;           // if it goes on there, but differently: with how many tokens
  bool checkpoint_at_end = false;  // one lies at exactly tokens.size()
  Node* resume = nullptr;          // the deepest node with a checkpoint at or below the limit
  Node* last = nullptr;            // the deepest node whose path matches in full
};

class Tree {
 public:
  Tree(const Options& options, Arena& arena, ContentTable& contents, Digest& digest)
      : paging_(options.paging), small_part_(options.small_part), arena_(arena), contents_(contents), digest_(digest) {}
  ~Tree();
  Tree(const Tree&) = delete;
  Tree& operator=(const Tree&) = delete;
  void watch(CheckpointWatcher* watcher) { watcher_ = watcher; }
  void watch_nodes(NodeWatcher* watcher) { node_watcher_ = watcher; }
  void watch_holdings(HoldingsWatcher* watcher) { holdings_watcher_ = watcher; }

  // The root of a salt; null if nothing is known under it. O(log salts).
  Node* find_root(const std::string& salt) const;
  Node* make_root(const std::string& salt);
  const std::map<std::string, Node*>& roots() const { return roots_; }

  // How far `tokens` are known, and the deepest checkpoint at or below `limit`, from the node `from` on, whose path
  // they match. Changes nothing (I9). One memcmp pass over what lies beyond it.
  Walk walk(const Node* from, std::span<const Token> tokens, Position limit) const;

  // The node at exactly from->depth + tokens.size() below `from`, or null.
  Node* find(Node* from, std::span<const Token> tokens) const;
  // The node of the path to `node` at exactly `depth`, or null.
  static Node* ancestor_at(Node* node, Position depth);
  // The next node of the path above `node` that has a checkpoint, or null.
  static Node* checkpoint_above(const Node* node);

  // Goes down from `from` by `tokens`, splitting and creating what is missing, to a node at exactly from->depth +
  // tokens.size(). Where it creates, the lease's pages become the tree's. The caller pins the result, or gives it a
  // checkpoint, before anything settles.
  Node* extend(Node* from, std::span<const Token> tokens, const LeasePages& pages);

  // The node stays, and with `hold` its checkpoint, too, if it has one.
  void pin(Node* node) { ++node->pins; }
  void unpin(Node* node);
  void hold(Node* node);
  void let_go(Node* node);

  // REQUIRES checkpoint.position == node->depth: the position travels with the slot (I2).
  void attach(Node* node, const Checkpoint& checkpoint);
  void set_tail(Node* node, PageId page);
  SlotId take_back(Node* node, Cause why);  // the checkpoint goes, its slot is the caller's
  void detach(Node* node, Cause why);       // frees slot and tail, then settles
  void pin_checkpoint(Node* node);          // REQUIRES: the caller has a pin at or below the node
  void unpin_checkpoint(Node* node);
  void touch(Node* node);  // used again: newest tick, not superseded
  void supersede(Node* node);

  // Page number `number` of the path to `node`. REQUIRES: it is whole there.
  PageId path_page(const Node* node, Position number) const;
  // Brings `table` to the pages of the path to `node` that are whole there; it holds those of the path to `above`
  // already (null: none).
  void follow_pages(const Node* above, const Node* node, std::vector<PageId>& table) const;

  std::int64_t nodes() const { return nodes_.get(); }
  std::int64_t checkpoints() const { return checkpoints_.get(); }
  std::int64_t checkpoints(Kind kind) const { return by_kind_[index(kind)].get(); }
  std::int64_t pinned_checkpoints() const { return pinned_.get(); }

 private:
  Node* make_leaf(Node* parent, std::span<const Token> edge, const LeasePages& from);
  Node* split(Node* node, Position at);
  void merge_into_child(Node* node);
  void remove_leaf(Node* node);
  void remove_root(Node* root);
  void settle(Node* node);
  void add_child(Node* parent, Node* child);
  void pinned_changed(const Node& node, bool pinned);
  void going(Node* node) {
    if (node->followed) node_watcher_->going(*node);
    nodes_.add(-1);
  }
  void leaf_changed(Node* node) {
    if (node->checkpoint) watcher_->changed(*node);
  }

  const Paging paging_;
  const std::size_t small_part_;
  Arena& arena_;
  ContentTable& contents_;
  Digest& digest_;
  CheckpointWatcher* watcher_ = nullptr;
  NodeWatcher* node_watcher_ = nullptr;
  HoldingsWatcher* holdings_watcher_ = nullptr;  // null: nobody asks
  std::map<std::string, Node*> roots_;
  std::uint64_t tick_ = 0;
  Counter nodes_, checkpoints_, by_kind_[kKinds], pinned_;
};

}  // namespace hybridcache
