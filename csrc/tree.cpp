#include "tree.h"

#include <algorithm>
#include <memory>

#include "radix.h"

namespace hybridcache {

namespace {
enum Event : std::uint64_t { kAttach = 16, kDetach, kTouch, kSupersede };
}  // namespace

// ---------------------------------------------------------------- content

Token ContentTable::find(Token token, const std::string& content) const {
  const auto it = ids_.find({token, content});
  return it == ids_.end() ? kUnknown : it->second;
}

Token ContentTable::acquire(Token token, const std::string& content) {
  const auto [it, inserted] = ids_.try_emplace({token, content}, kUnknown);
  if (inserted) {
    if (free_.empty()) {
      entries_.push_back({});
      free_.push_back(-static_cast<Token>(entries_.size()));
    }
    it->second = free_.back();
    free_.pop_back();
    entries_[slot(it->second)] = {&it->first, 0};
  }
  ++entries_[slot(it->second)].users;
  return it->second;
}

void ContentTable::acquire(std::span<const Token> tokens) {
  if (ids_.empty()) return;  // most models see no images
  for (const Token token : tokens) {
    if (token < 0) ++entries_[slot(token)].users;
  }
}

void ContentTable::release(std::span<const Token> tokens) {
  if (ids_.empty()) return;
  for (const Token token : tokens) {
    if (token >= 0 || --entries_[slot(token)].users > 0) continue;
    ids_.erase(Key(*entries_[slot(token)].key));
    free_.push_back(token);
  }
}

void ContentTable::release(TokenRange tokens) {
  for (auto left = tokens; !left.empty(); left = left.rest()) release(left.head());
}

// ---------------------------------------------------------------- reading

Node* Tree::find_root(const std::string& salt) const {
  const auto it = roots_.find(salt);
  return it == roots_.end() ? nullptr : it->second;
}

Walk Tree::walk(const Node* from, std::span<const Token> tokens, Position limit) const {
  Walk walk;
  walk.matched = from == nullptr ? 0 : from->depth;
  const auto length = static_cast<Position>(tokens.size());
  for (const Node* node = from; node != nullptr;) {
    walk.last = const_cast<Node*>(node);
    if (node->checkpoint && node->depth <= limit) walk.resume = const_cast<Node*>(node);
    if (walk.matched == length) {
      walk.checkpoint_at_end = node->checkpoint.has_value();
      break;
    }
    const Node* child = child_at(node->children, tokens[walk.matched]);
    if (child == nullptr) {
      walk.ways = static_cast<std::int64_t>(node->children.size());
      break;
    }
    __builtin_prefetch(child->children.data());  // comes while the edge is compared
    const auto common = common_prefix(child->edge.all(), tokens.subspan(walk.matched));
    walk.matched += static_cast<Position>(common);
    if (common < child->edge.size()) {  // the walk must not go on into this child's children
      walk.ways = walk.matched < length ? 1 : 0;
      break;
    }
    node = child;
  }
  return walk;
}

Node* Tree::find(Node* from, std::span<const Token> tokens) const {
  while (from != nullptr && !tokens.empty()) {
    from = child_at(from->children, tokens.front());
    if (from == nullptr || from->edge.size() > tokens.size()) return nullptr;
    if (common_prefix(from->edge.all(), tokens) < from->edge.size()) return nullptr;
    tokens = tokens.subspan(from->edge.size());
  }
  return from;
}

Node* Tree::checkpoint_above(const Node* node) {
  Node* above = node->parent;
  while (above != nullptr && !above->checkpoint) above = above->parent;
  return above;
}

Node* Tree::ancestor_at(Node* node, Position depth) {
  while (node->depth > depth) node = node->parent;
  return node->depth == depth ? node : nullptr;
}

PageId Tree::path_page(const Node* node, Position number) const {
  while (paging_.whole(node->begin()) > number) node = node->parent;
  return node->pages.at(number - paging_.whole(node->begin()));
}

void Tree::follow_pages(const Node* above, const Node* node, std::vector<PageId>& table) const {
  table.resize(paging_.whole(node->depth));
  std::vector<const Node*> path;
  for (; node != above && node->parent != nullptr; node = node->parent) path.push_back(node);
  for (std::size_t i = 0; i < path.size(); ++i) {
    if (i + 8 < path.size()) __builtin_prefetch(path[i + 8]->pages.data());
    std::copy(path[i]->pages.begin(), path[i]->pages.end(), table.begin() + paging_.whole(path[i]->begin()));
  }
}

// ---------------------------------------------------------------- growing

Node* Tree::make_root(const std::string& salt) {
  if (Node* known = find_root(salt)) return known;
  auto root = std::make_unique<Node>();
  const auto it = roots_.try_emplace(salt, root.get()).first;
  root->salt = &it->first;
  nodes_.add();
  return root.release();
}

void Tree::add_child(Node* parent, Node* child) {
  child->parent = parent;
  parent->children.insert(child_position(parent->children, child->edge.front()), {child->edge.front(), child});
  if (parent->children.size() == 1) leaf_changed(parent);
}

Node* Tree::make_leaf(Node* parent, std::span<const Token> edge, const LeasePages& from) {
  auto* leaf = new Node;
  leaf->edge = Edge(edge);
  leaf->depth = parent->depth + static_cast<Position>(edge.size());
  leaf->has_content = from.has_content && std::any_of(edge.begin(), edge.end(), [](Token token) { return token < 0; });
  if (leaf->has_content) contents_.acquire(edge);
  for (auto page = paging_.whole(parent->depth); page < paging_.whole(leaf->depth); ++page) {
    ensure(from.owned[page], "a page joins the tree that its lease does not own");
    from.owned[page] = false;
    arena_.join_node(from.table[page]);
    leaf->pages.push_back(from.table[page]);
  }
  nodes_.add();
  add_child(parent, leaf);
  if (holdings_watcher_ != nullptr) holdings_watcher_->pages_joined(*leaf);
  return leaf;
}

// The upper part becomes a new node; `node` keeps its identity, its checkpoint, its pins and the lower part.
Node* Tree::split(Node* node, Position at) {
  if (node->checkpoint) watcher_->splitting(*node, at);
  auto* upper = new Node;
  const auto cut = static_cast<std::size_t>(at - node->begin());
  const auto pages = static_cast<std::size_t>(paging_.whole(at) - paging_.whole(node->begin()));
  upper->depth = at;
  upper->has_content = node->has_content;
  upper->edge = node->edge.take_front(cut, small_part_);
  upper->pages.assign(node->pages.begin(), node->pages.begin() + pages);
  upper->parent = node->parent;
  child_position(node->parent->children, upper->edge.front())->second = upper;
  node->pages.erase(node->pages.begin(), node->pages.begin() + pages);
  node->parent = upper;
  upper->children.push_back({node->edge.front(), node});
  nodes_.add();
  leaf_changed(node);
  return upper;
}

Node* Tree::extend(Node* from, std::span<const Token> tokens, const LeasePages& pages) {
  while (!tokens.empty()) {
    Node* child = child_at(from->children, tokens.front());
    if (child == nullptr) return make_leaf(from, tokens, pages);
    const auto common = common_prefix(child->edge.all(), tokens);
    from = common < child->edge.size() ? split(child, child->begin() + static_cast<Position>(common)) : child;
    tokens = tokens.subspan(common);
  }
  return from;
}

// ---------------------------------------------------------------- shrinking

void Tree::settle(Node* node) {
  while (node->parent != nullptr) {
    if (node->checkpoint || node->pins > 0 || node->children.size() > 1) return;
    if (node->children.size() == 1) return merge_into_child(node);
    Node* parent = node->parent;
    remove_leaf(node);
    node = parent;
  }
  if (node->children.empty() && node->pins == 0) remove_root(node);
}

void Tree::remove_leaf(Node* node) {
  if (holdings_watcher_ != nullptr) holdings_watcher_->pages_leaving(*node);
  Node* parent = node->parent;
  if (node->has_content) contents_.release(node->edge.all());
  parent->children.erase(child_position(parent->children, node->edge.front()));
  if (parent->children.empty()) leaf_changed(parent);
  for (const PageId page : node->pages) arena_.leave_node(page);
  going(node);
  delete node;
}

void Tree::remove_root(Node* root) {
  roots_.erase(roots_.find(*root->salt));
  going(root);
  delete root;
}

// The child keeps its identity and takes the buffers of the node above it: O(pages of the child), however long the
// path.
void Tree::merge_into_child(Node* node) {
  Node* child = node->children.front().second;
  node->edge.append(std::move(child->edge), small_part_);
  node->pages.insert(node->pages.end(), child->pages.begin(), child->pages.end());
  child->edge = std::move(node->edge);
  child->pages = std::move(node->pages);
  child->has_content |= node->has_content;
  child->parent = node->parent;
  child_position(node->parent->children, child->edge.front())->second = child;
  going(node);
  delete node;
  leaf_changed(child);
}

Tree::~Tree() {
  std::vector<Node*> left;
  for (const auto& [salt, root] : roots_) left.push_back(root);
  while (!left.empty()) {  // not recursive: a path may be as deep as it is long
    Node* node = left.back();
    left.pop_back();
    for (const auto& [first, child] : node->children) left.push_back(child);
    delete node;
  }
}

// ---------------------------------------------------------------- pins and checkpoints

void Tree::hold(Node* node) {
  pin(node);
  if (node->checkpoint) pin_checkpoint(node);
}

void Tree::let_go(Node* node) {
  if (node->checkpoint) unpin_checkpoint(node);
  unpin(node);
}

void Tree::unpin(Node* node) {
  ensure(node->pins > 0, "unpin of a node without a pin");
  if (--node->pins == 0) settle(node);
}

void Tree::attach(Node* node, const Checkpoint& checkpoint) {
  const auto position = checkpoint.position;
  ensure(position == node->depth && position > 0 && !node->checkpoint,
         "I2: a checkpoint joins a node of another depth, or a second one");
  node->checkpoint = checkpoint;
  node->checkpoint->tick = ++tick_;
  checkpoints_.add();
  by_kind_[index(checkpoint.kind)].add();
  digest_.mix(kAttach, (static_cast<std::uint64_t>(position) << 8 | index(checkpoint.kind)) ^
                           (static_cast<std::uint64_t>(checkpoint.slot) << 32));
  watcher_->joined(*node);
  if (holdings_watcher_ != nullptr) holdings_watcher_->checkpoint_joined(*node);
}

void Tree::set_tail(Node* node, PageId page) {
  ensure(node->checkpoint->tail == kNone, "a checkpoint with two tails");
  node->checkpoint->tail = page;
  arena_.add_tail(page);
  if (node->checkpoint->pins > 0) arena_.pin_tail(page);
}

SlotId Tree::take_back(Node* node, Cause why) {
  if (holdings_watcher_ != nullptr) holdings_watcher_->checkpoint_leaving(*node);
  watcher_->leaving(*node, why);
  const SlotId slot = node->checkpoint->slot;
  const PageId tail = node->checkpoint->tail;
  digest_.mix(kDetach, slot);
  by_kind_[index(node->checkpoint->kind)].add(-1);
  if (node->checkpoint->pins > 0) pinned_changed(*node, false);
  node->checkpoint.reset();
  checkpoints_.add(-1);
  watcher_->left(*node);
  if (tail != kNone) arena_.drop_tail(tail);
  settle(node);
  return slot;
}

void Tree::detach(Node* node, Cause why) {
  arena_.free_slot(take_back(node, why));
}

void Tree::pinned_changed(const Node& node, bool pinned) {
  pinned_.add(pinned ? 1 : -1);
  const PageId tail = node.checkpoint->tail;
  if (tail == kNone) return;
  if (pinned) {
    arena_.pin_tail(tail);
  } else {
    arena_.unpin_tail(tail);
  }
}

void Tree::pin_checkpoint(Node* node) {
  if (node->checkpoint->pins++ == 0) pinned_changed(*node, true);
  watcher_->changed(*node);
}

void Tree::unpin_checkpoint(Node* node) {
  ensure(node->checkpoint && node->checkpoint->pins > 0, "unpin of a checkpoint without a pin");
  if (--node->checkpoint->pins == 0) pinned_changed(*node, false);
  watcher_->changed(*node);
}

void Tree::touch(Node* node) {
  node->checkpoint->tick = ++tick_;
  ++node->checkpoint->uses;
  node->checkpoint->superseded = false;
  digest_.mix(kTouch, node->checkpoint->slot);
  watcher_->changed(*node);
}

void Tree::supersede(Node* node) {
  node->checkpoint->superseded = true;
  digest_.mix(kSupersede, node->checkpoint->slot);
  watcher_->changed(*node);
}

}  // namespace hybridcache
