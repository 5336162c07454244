// Re-derives every invariant from scratch, and prints what there is. Reads everything, changes nothing.
#pragma once

#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "cache.h"

namespace hybridcache {

class Checker {
 public:
  explicit Checker(const Cache& cache) : cache_(cache) {}

  // Throws InvariantError that names the invariant and prints the tree. O(pages + slots + nodes + leases).
  void check();
  // Salts, nodes with what they hold, leases, and the arena, as indented text.
  std::string dump() const;

 private:
  struct Owners {
    int node = 0;
    int tails = 0;
    int pinned_tails = 0;
    int lease = 0;
  };

  // `what` is text, or a callable that makes it: it runs on every check, and its text is needed once, if ever.
  template <class What>
  void require(bool holds, const char* invariant, What&& what) const {
    if (holds) [[likely]]
      return;
    if constexpr (std::is_invocable_v<What>) {
      fail(invariant, what());
    } else {
      fail(invariant, what);
    }
  }
  [[noreturn]] void fail(const std::string& invariant, const std::string& what) const;
  void visit_tree();
  void visit_node(const Node& node);
  // Whether there are (token, content) pairs among them.
  bool count_contents(std::span<const Token> tokens);
  bool count_contents(TokenRange tokens);
  void visit_checkpoint(const Node& node);
  void visit_lease(const Lease& lease);
  void visit_page_table(const Lease& lease);
  void visit_path(const Lease& lease) const;
  void visit_transcript(const Transcript& transcript);
  void check_pins();
  void check_partition() const;
  void check_slabs() const;
  void check_pending() const;
  void print_node(std::string& out, const Node& node, int indent) const;
  void print_lease(std::string& out, const Lease& lease) const;

  const Cache& cache_;
  std::vector<Owners> pages_;
  std::vector<int> slots_;
  std::map<const Node*, int> node_pins_, checkpoint_pins_;
  std::vector<const Node*> nodes_;
  std::map<Token, std::int64_t> content_users_;
  std::int64_t unpinned_ = 0, checkpoints_ = 0, by_kind_[kKinds] = {};
};

}  // namespace hybridcache
