#include "eviction.h"

#include <algorithm>
#include <map>

namespace hybridcache {

Eviction::Eviction(const Options& options, Tree& tree, History& history)
    : options_(options), tree_(tree), history_(history) {
  tree.watch(this);
  history.watch(this);
}

// ---------------------------------------------------------------- worth

// What leaves with it: its state, and if nothing goes on from it the pages of its node.
std::uint64_t Eviction::bytes(const Node& node) const {
  auto bytes = static_cast<std::uint64_t>(options_.slot_bytes);
  if (node.children.empty()) bytes += node.pages.size() * options_.page_bytes;
  return bytes;
}

// uses x tokens that it saves over the next checkpoint above / bytes that leave with it.
Worth Eviction::density(const Node& node, std::uint64_t uses) const {
  const Node* above = Tree::checkpoint_above(&node);
  const auto saved = static_cast<std::uint64_t>(node.depth - (above == nullptr ? 0 : above->depth));
  const auto wide = (static_cast<unsigned __int128>(uses) * saved << 20) / bytes(node);
  return static_cast<Worth>(std::min<unsigned __int128>(wide, kAny - 1));
}

Worth Eviction::worth(Node& node) const {
  auto& checkpoint = *node.checkpoint;
  switch (options_.policy) {
    case Policy::lru:
    case Policy::marconi:
      return 1;
    case Policy::supersede:
      return checkpoint.superseded ? 0 : 1;
    case Policy::gdsf:
      if (checkpoint.based_on != checkpoint.tick) {
        checkpoint.base = inflation_;
        checkpoint.based_on = checkpoint.tick;
      }
      return checkpoint.base + std::min(density(node, checkpoint.uses + 1), kAny - checkpoint.base);
    case Policy::learned:
      if (checkpoint.record == nullptr) return 1;
      return 1 + density(node, checkpoint.record->index + (options_.has(Part::flow) ? checkpoint.record->flow : 0));
  }
  return 1;
}

Worth Eviction::limit(Kind kind) const {
  return replaces_any(kind) || options_.policy == Policy::learned ? kAny : 1;
}

// ---------------------------------------------------------------- the order

void Eviction::drop(Node& node) {
  order_.strike(node);
  leaves_.strike(node);
}

void Eviction::place(Node& node) {
  const auto& checkpoint = *node.checkpoint;
  if (checkpoint.pins > 0) {
    drop(node);
    if (checkpoint.record != nullptr) history_.give(checkpoint.record, 0);
    return;
  }
  const Heap::Key key = {worth(node), checkpoint.tick};
  order_.put(node, key);
  node.children.empty() ? leaves_.put(node, key) : leaves_.strike(node);
  if (checkpoint.record != nullptr) share(node, key.first);
}

// A checkpoint that may leave soon gives a share of its index to the one that its followers would fall back to.
void Eviction::share(Node& node, Worth worth) {
  Record* record = node.checkpoint->record;
  const unsigned __int128 price = 2 * price_;
  const auto ratio = worth <= price ? 256 : static_cast<Rate>((price << 8) / worth);
  const Rate given = record->hint == Hint::returns ? (record->index + record->flow) * ratio >> 8 : 0;
  const auto off = given > record->given ? given - record->given : record->given - given;
  if (off > (given + record->given) / 16) history_.give(record, given);
}

void Eviction::worth_changed(Node& node) {
  if (node.checkpoint && order_.holds(node)) place(node);
}

void Eviction::joined(Node& node) {
  if (node.checkpoint->record != nullptr) history_.resident(node.checkpoint->record, &node);
  place(node);
  place_below(node);
}

void Eviction::leaving(Node& node, Cause why) {
  drop(node);
  if (node.checkpoint->record != nullptr) history_.ghost(node.checkpoint->record, why);
}

// What the next checkpoints below save has changed.
void Eviction::place_below(Node& node) {
  if (options_.policy != Policy::learned && options_.policy != Policy::gdsf) return;
  std::vector<Node*> left;
  for (const auto& [first, child] : node.children) left.push_back(child);
  while (!left.empty()) {
    Node* below = left.back();
    left.pop_back();
    if (below->checkpoint) {
      if (order_.holds(*below)) place(*below);
      continue;
    }
    for (const auto& [first, child] : below->children) left.push_back(child);
  }
}

Node* Eviction::lowest(Worth limit, bool leaf_first) const {
  if (options_.policy == Policy::marconi && limit == kAny) return least_by_score();
  for (const auto* order : {&leaves_, &order_}) {
    if (order == &leaves_ && !leaf_first) continue;
    const auto* least = order->first();
    if (least != nullptr && (limit == kAny || least->key.first < limit)) return least->node;
  }
  return nullptr;
}

// Both parts scaled to [0, 2**16] over those that may leave: they have at most one child.
Node* Eviction::least_by_score() const {
  std::uint64_t newest = 0, oldest = UINT64_MAX, most = 1;
  for (const auto& [key, node] : order_.entries()) {
    newest = std::max(newest, key.second);
    oldest = std::min(oldest, key.second);
    most = std::max(most, density(*node, 1));
  }
  Node* least = nullptr;
  std::pair<unsigned __int128, std::uint64_t> lowest;
  for (const auto& [key, node] : order_.entries()) {
    if (node->children.size() > 1) continue;
    const auto recency = ((key.second - oldest) << 16) / std::max<std::uint64_t>(newest - oldest, 1);
    const auto efficiency = (static_cast<unsigned __int128>(density(*node, 1)) << 16) / most;
    const auto score = (static_cast<unsigned __int128>(recency) << 16) + efficiency * options_.marconi_alpha;
    if (least != nullptr && lowest < std::pair(score, key.second)) continue;
    least = node;
    lowest = {score, key.second};
  }
  return least != nullptr || order_.first() == nullptr ? least : order_.first()->node;
}

void Eviction::evict(Node* node, Cause why) {
  ensure(node->checkpoint && node->checkpoint->pins == 0, "eviction of a pinned checkpoint");
  evicted_[index(node->checkpoint->kind)].add();
  if (options_.policy == Policy::learned) {
    const auto weight = static_cast<__int128>(bytes(*node));
    const auto change = static_cast<__int128>(order_.key(*node).first) - static_cast<__int128>(price_);
    price_ += static_cast<Worth>(change * weight / (weight + 32 * options_.slot_bytes));
  }
  if (options_.policy == Policy::gdsf) inflation_ = order_.key(*node).first;
  tree_.detach(node, why);
}

std::vector<Node*> Eviction::all() const {
  auto entries = order_.entries();
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.key < b.key; });
  std::vector<Node*> nodes;
  for (const auto& [key, node] : entries) nodes.push_back(node);
  return nodes;
}

void Eviction::each_leaving(const std::function<bool(const Node&)>& visit) const {
  std::map<const Node*, std::size_t> gone;  // children, where there are several
  for (const auto& [key, leaf] : leaves_.entries()) {
    for (const Node* node = leaf; node->parent != nullptr && node->pins == 0; node = node->parent) {
      if (node->children.size() > 1 && ++gone[node] < node->children.size()) break;
      if (!visit(*node)) return;
    }
  }
}

bool Eviction::places(const Node& node) const {
  const auto& checkpoint = *node.checkpoint;
  const bool unpinned = checkpoint.pins == 0;
  if (order_.holds(node) != unpinned || leaves_.holds(node) != (unpinned && node.children.empty())) return false;
  if (!unpinned) return true;
  const Heap::Key key = {worth(const_cast<Node&>(node)), checkpoint.tick};
  if (!order_.is_right(node) || order_.key(node) != key) return false;
  return !leaves_.holds(node) || (leaves_.is_right(node) && leaves_.key(node) == key);
}

}  // namespace hybridcache
