#include "edge.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace hybridcache {

namespace {
EdgePart* make_part(std::size_t size) {
  void* memory = std::malloc(sizeof(EdgePart) + size * sizeof(Token));
  if (memory == nullptr) throw std::bad_alloc();
  return new (memory) EdgePart{nullptr, nullptr, size, size};
}
}  // namespace

Edge::Edge(std::span<const Token> tokens) {
  if (tokens.empty()) return;
  head_ = tail_ = make_part(tokens.size());
  size_ = tokens.size();
  std::ranges::copy(tokens, head_->tokens());
}

Edge::Edge(TokenRange tokens) {
  if (tokens.empty()) return;
  head_ = tail_ = make_part(tokens.size());
  size_ = tokens.size();
  tokens.copy_to(head_->tokens());
}

Edge::~Edge() {
  while (head_ != nullptr) std::free(std::exchange(head_, head_->next));
}

TokenRange Edge::last(std::size_t count) const {
  const auto begin = size_ - count;
  if (begin < count) {
    const EdgePart* part = head_;
    auto skip = begin;
    for (; skip >= part->size; part = part->next) skip -= part->size;
    return {part, skip, count};
  }
  if (count == 0) return {nullptr, 0, 0};
  const EdgePart* part = tail_;
  auto from = size_ - part->size;  // where the part begins
  while (from > begin) {
    part = part->before;
    from -= part->size;
  }
  return {part, begin - from, count};
}

// `part` stands after `before` (null: first).
void Edge::link(EdgePart* before, EdgePart* part) {
  (before == nullptr ? head_ : before->next) = part;
  (part == nullptr ? tail_ : part->before) = before;
}

// Of a part of this edge; it may move.
EdgePart* Edge::resize(EdgePart* part, std::size_t capacity) {
  void* memory = std::realloc(static_cast<void*>(part), sizeof(EdgePart) + capacity * sizeof(Token));
  if (memory == nullptr) throw std::bad_alloc();
  part = static_cast<EdgePart*>(memory);
  part->capacity = capacity;
  link(part->before, part);
  link(part, part->next);
  return part;
}

// A part and the one after it become one, if they are small.
void Edge::join(EdgePart* part, std::size_t small) {
  if (part == nullptr || part->next == nullptr || part->size + part->next->size > small) return;
  const auto size = part->size + part->next->size;
  if (size > part->capacity) part = resize(part, std::max(size, std::min(2 * part->capacity, small)));
  EdgePart* next = part->next;
  std::copy_n(next->tokens(), next->size, part->tokens() + part->size);
  part->size = size;
  link(part, next->next);
  std::free(next);
}

void Edge::append(Edge&& below, std::size_t small) {
  if (below.empty()) return;
  EdgePart* last = tail_;
  link(last, below.head_);
  tail_ = std::exchange(below.tail_, nullptr);
  below.head_ = nullptr;
  size_ += std::exchange(below.size_, 0);
  join(last, small);
}

// Makes two of `part`, whose tokens from number `count` on are the second's, which is returned. Copies the fewer.
EdgePart* Edge::divide(EdgePart* part, std::size_t count) {
  const auto others = part->size - count;
  if (others <= count) {
    EdgePart* lower = make_part(others);
    std::copy_n(part->tokens() + count, others, lower->tokens());
    part->size = count;
    link(lower, part->next);
    link(part, lower);
    resize(part, count);
    return lower;
  }
  EdgePart* upper = make_part(count);
  std::copy_n(part->tokens(), count, upper->tokens());
  std::memmove(part->tokens(), part->tokens() + count, others * sizeof(Token));
  part->size = others;
  link(part->before, upper);
  link(upper, part);
  return resize(part, others);
}

Edge Edge::take_front(std::size_t count, std::size_t small) {
  EdgePart* part = head_;
  std::size_t from = 0;  // where it begins
  while (from + part->size <= count) {
    from += part->size;
    part = part->next;
  }
  if (from < count) part = divide(part, count - from);
  Edge front;
  front.head_ = head_;
  front.tail_ = part->before;
  front.size_ = count;
  front.tail_->next = nullptr;
  head_ = part;
  part->before = nullptr;
  size_ -= count;
  front.join(front.tail_->before, small);
  join(head_, small);
  return front;
}

bool Edge::is_right(std::size_t small) const {
  std::size_t size = 0;
  const EdgePart* before = nullptr;
  for (const EdgePart* part = head_; part != nullptr; before = std::exchange(part, part->next)) {
    if (part->before != before || part->size == 0 || part->size > part->capacity) return false;
    if (before != nullptr && before->size + part->size <= small) return false;
    size += part->size;
  }
  return tail_ == before && size_ == size;
}

}  // namespace hybridcache
