#include "journal.h"

#include <algorithm>
#include <iterator>

namespace hybridcache {

// Salt, page before, tokens and contents of [begin, end) of the path to `node`, from a page edge on. O(end - begin +
// nodes there), and the walk up to the root for its salt.
void Journal::add_path(Event& event, const Node* node, Position begin, Position end) {
  const auto number = begin / paging_.page_size;
  if (number > 0) event.before = tree_.path_page(node, number - 1);
  event.tokens.resize(end - begin);
  for (; node->parent != nullptr; node = node->parent) {
    for (auto at = std::max(begin, node->begin()); at < std::min(end, node->depth); ++at)
      event.tokens[at - begin] = node->edge[at - node->begin()];
  }
  event.salt = *node->salt;
  for (auto& token : event.tokens) {
    if (token >= 0) continue;
    event.contents.push_back({&token - event.tokens.data(), contents_.content(token)});
    token = contents_.token(token);
  }
}

void Journal::pages_joined(const Node& leaf) {
  if (leaf.pages.empty()) return;
  Event event{Event::What::pages_stored};
  event.pages = leaf.pages;
  const auto end = paging_.whole(leaf.depth) * paging_.page_size;
  add_path(event, &leaf, end - std::ssize(leaf.pages) * paging_.page_size, end);
  events_.push_back(std::move(event));
}

// The deepest first, so that none of them is ever without the one before it.
void Journal::pages_leaving(const Node& leaf) {
  if (leaf.pages.empty()) return;
  Event event{Event::What::pages_removed};
  event.pages.assign(leaf.pages.rbegin(), leaf.pages.rend());
  events_.push_back(std::move(event));
}

void Journal::checkpoint_joined(const Node& node) {
  Event event{Event::What::checkpoint_stored};
  event.slot = node.checkpoint->slot;
  event.position = node.depth;
  add_path(event, &node, (node.depth - 1) / paging_.page_size * paging_.page_size, node.depth);
  events_.push_back(std::move(event));
}

void Journal::checkpoint_leaving(const Node& node) {
  Event event{Event::What::checkpoint_removed};
  event.slot = node.checkpoint->slot;
  events_.push_back(std::move(event));
}

void Journal::cleared(std::size_t before) {
  events_.resize(before, Event{Event::What::cleared});
  events_.push_back(Event{Event::What::cleared});
}

}  // namespace hybridcache
