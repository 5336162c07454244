#include "journal.h"

#include <algorithm>
#include <iterator>

namespace hybridcache {

// Salt, page before, tokens and contents of [begin, end) of the path to `node`, from a page edge on. O(end - begin +
// nodes there), and the walk up to the root for its salt.
void Journal::add_path(Event& event, const Node* node, Position begin, Position end) const {
  const auto number = begin / paging_.page_size;
  if (number > 0) event.before = tree_.path_page(node, number - 1);
  event.tokens.resize(end - begin);
  for (; node->parent != nullptr; node = node->parent) {
    const auto from = std::max(begin, node->begin()), to = std::min(end, node->depth);
    if (from < to) node->edge.last(node->depth - from).first(to - from).copy_to(event.tokens.data() + (from - begin));
  }
  event.salt = *node->salt;
  for (auto& token : event.tokens) {
    if (token >= 0) continue;
    event.contents.push_back({&token - event.tokens.data(), contents_.content(token)});
    token = contents_.token(token);
  }
}

Event Journal::pages_of(const Node& node) const {
  Event event{Event::What::pages_stored};
  event.pages = node.pages;
  const auto end = paging_.whole(node.depth) * paging_.page_size;
  add_path(event, &node, end - std::ssize(node.pages) * paging_.page_size, end);
  return event;
}

Event Journal::checkpoint_of(const Node& node) const {
  Event event{Event::What::checkpoint_stored};
  event.slot = node.checkpoint->slot;
  event.position = node.depth;
  add_path(event, &node, (node.depth - 1) / paging_.page_size * paging_.page_size, node.depth);
  return event;
}

namespace {
std::int64_t ids_of(const Event& event) {
  return 1 + std::ssize(event.pages) + std::ssize(event.tokens);
}
}  // namespace

void Journal::record(Event event) {
  ids_ += ids_of(event);
  if (ids_ > capacity_) {
    drop();
    overflowed_ = true;
  } else {
    events_.push_back(std::move(event));
  }
}

void Journal::forget_from(std::size_t size) {
  for (; events_.size() > size; events_.pop_back()) ids_ -= ids_of(events_.back());
}

// ---------------------------------------------------------------- what the tree tells

void Journal::pages_joined(const Node& leaf) {
  if (!overflowed_ && !leaf.pages.empty()) record(pages_of(leaf));
}

// The deepest first, so that none of them is ever without the one before it.
void Journal::pages_leaving(const Node& leaf) {
  if (overflowed_ || leaf.pages.empty()) return;
  Event event{Event::What::pages_removed};
  event.pages.assign(leaf.pages.rbegin(), leaf.pages.rend());
  record(std::move(event));
}

void Journal::checkpoint_joined(const Node& node) {
  if (!overflowed_) record(checkpoint_of(node));
}

void Journal::checkpoint_leaving(const Node& node) {
  if (overflowed_) return;
  Event event{Event::What::checkpoint_removed};
  event.slot = node.checkpoint->slot;
  record(std::move(event));
}

void Journal::cleared(std::size_t before) {
  if (overflowed_) return;
  forget_from(before);
  record(Event{Event::What::cleared});
}

// ---------------------------------------------------------------- what is read

const std::vector<Event>& Journal::events() {
  if (overflowed_) announce_all();
  return events_;
}

void Journal::drop() {
  events_ = {};  // its memory, too
  ids_ = 0;
  overflowed_ = false;
}

// From nothing to what the tree holds now: each page and checkpoint behind those above it.
void Journal::announce_all() {
  events_.assign(1, Event{Event::What::cleared});
  for (const auto& [salt, root] : tree_.roots()) {
    std::vector<const Node*> left = {root};
    while (!left.empty()) {
      const Node& node = *left.back();
      left.pop_back();
      if (!node.pages.empty()) events_.push_back(pages_of(node));
      if (node.checkpoint) events_.push_back(checkpoint_of(node));
      for (const auto& [first, child] : node.children) left.push_back(child);
    }
  }
}

}  // namespace hybridcache
