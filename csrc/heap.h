// Which unpinned checkpoint leaves first: a heap of them by (worth, tick). It owns its array and no node. A checkpoint
// knows its place in it, so that its worth changes where it stands: O(log n), and O(1) for the small changes that come
// with time. To enter one allocates only as the array grows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "tree.h"

namespace hybridcache {

using Worth = std::uint64_t;

class Heap {
 public:
  using Key = std::pair<Worth, std::uint64_t>;  // (worth, tick): ticks are unique, so the order is total
  struct Entry {
    Key key;
    Node* node;
  };
  using Place = std::int32_t Checkpoint::*;

  explicit Heap(Place place) : place_(place) {}

  bool holds(const Node& node) const { return at(node) >= 0; }
  const Key& key(const Node& node) const { return entries_[at(node)].key; }  // REQUIRES: it holds it
  // Enters the node, or moves it to where this key belongs.
  void put(Node& node, const Key& key) {
    if (!holds(node)) {
      entries_.push_back({key, &node});
      return rise(entries_.size() - 1);
    }
    const auto i = static_cast<std::size_t>(at(node));
    const bool less = key < entries_[i].key;
    entries_[i].key = key;
    less ? rise(i) : sink(i);
  }
  void strike(Node& node) {
    if (!holds(node)) return;
    const auto i = static_cast<std::size_t>(std::exchange(at(node), -1));
    const Entry last = entries_.back();
    entries_.pop_back();
    if (i == entries_.size()) return;
    const bool less = last.key < entries_[i].key;
    entries_[i] = last;
    less ? rise(i) : sink(i);
  }
  const Entry* first() const { return entries_.empty() ? nullptr : &entries_.front(); }
  const std::vector<Entry>& entries() const { return entries_; }  // in no order but that of the heap
  // check(): is this node's entry where the heap wants it?
  bool is_right(const Node& node) const {
    const auto i = static_cast<std::size_t>(at(node));
    return i < entries_.size() && entries_[i].node == &node && (i == 0 || entries_[above(i)].key < entries_[i].key);
  }

 private:
  static constexpr std::size_t kChildren = 16;  // who moves writes to its node, which is cold: better few levels
  static std::size_t above(std::size_t i) { return (i - 1) / kChildren; }
  std::int32_t& at(Node& node) const { return (*node.checkpoint).*place_; }
  std::int32_t at(const Node& node) const { return (*node.checkpoint).*place_; }

  void set(std::size_t i, const Entry& entry) {
    entries_[i] = entry;
    at(*entry.node) = static_cast<std::int32_t>(i);
  }
  void rise(std::size_t i) {
    const Entry entry = entries_[i];
    for (; i > 0 && entry.key < entries_[above(i)].key; i = above(i)) set(i, entries_[above(i)]);
    set(i, entry);
  }
  void sink(std::size_t i) {
    const Entry entry = entries_[i];
    while (kChildren * i + 1 < entries_.size()) {
      const auto first = entries_.begin() + kChildren * i + 1;
      const auto end = first + std::min<std::ptrdiff_t>(kChildren, entries_.end() - first);
      const auto least = std::min_element(first, end, [](const Entry& a, const Entry& b) { return a.key < b.key; });
      if (entry.key < least->key) break;
      const auto below = static_cast<std::size_t>(least - entries_.begin());
      set(i, *least);
      i = below;
    }
    set(i, entry);
  }

  const Place place_;
  std::vector<Entry> entries_;
};

}  // namespace hybridcache
