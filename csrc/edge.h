// The tokens of an edge of a radix tree, in parts that stand in a list, so that one edge becomes two, and two become
// one, without moving more than a part. An edge owns its parts; a TokenRange reads some of it and owns nothing.
//
//    edge, 1700 tokens:   [832 tokens] <-> [832] <-> [36]
//
// Two neighbours hold more than `small` tokens between them, so what grows page by page is no list of pages.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

#include "types.h"

namespace hybridcache {

// Where a part begins; its tokens follow it in memory.
struct EdgePart {
  EdgePart* before = nullptr;
  EdgePart* next = nullptr;
  std::size_t size = 0;
  std::size_t capacity = 0;

  Token* tokens() { return reinterpret_cast<Token*>(this + 1); }
  const Token* tokens() const { return reinterpret_cast<const Token*>(this + 1); }
};

// Some tokens of an edge, as far as it is not changed; read span by span:
//   for (auto left = range; !left.empty(); left = left.rest()) use(left.head());
class TokenRange {
 public:
  // `size` tokens from number `skip` of `part` on. REQUIRES: skip < part->size, unless it is empty.
  TokenRange(const EdgePart* part, std::size_t skip, std::size_t size) : part_(part), skip_(skip), size_(size) {}

  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  // REQUIRES: count <= size().
  TokenRange first(std::size_t count) const { return {part_, skip_, count}; }
  std::span<const Token> head() const { return {part_->tokens() + skip_, std::min(size_, part_->size - skip_)}; }
  TokenRange rest() const { return {part_->next, 0, size_ - head().size()}; }
  Token front() const { return part_->tokens()[skip_]; }
  void copy_to(Token* out) const {
    for (auto left = *this; !left.empty(); left = left.rest()) out = std::ranges::copy(left.head(), out).out;
  }

 private:
  const EdgePart* part_;
  std::size_t skip_;
  std::size_t size_;
};

class Edge {
 public:
  Edge() = default;
  explicit Edge(std::span<const Token> tokens);
  explicit Edge(TokenRange tokens);  // a copy of them
  Edge(Edge&& other) noexcept { swap(other); }
  Edge& operator=(Edge&& other) noexcept {
    Edge(std::move(other)).swap(*this);
    return *this;
  }
  ~Edge();

  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  Token front() const { return head_->tokens()[0]; }
  TokenRange all() const { return {head_, 0, size_}; }
  TokenRange last(std::size_t count) const;  // O(parts, from the nearer end)

  // The tokens of `below` come after these: O(small).
  void append(Edge&& below, std::size_t small);
  // The first `count` are taken off and returned: O(parts of them + the part that is divided).
  // REQUIRES: 0 < count < size().
  Edge take_front(std::size_t count, std::size_t small);

  bool is_right(std::size_t small) const;  // check(): are its parts linked, counted, and not too many?

 private:
  void swap(Edge& other) noexcept {
    std::swap(head_, other.head_);
    std::swap(tail_, other.tail_);
    std::swap(size_, other.size_);
  }
  EdgePart* resize(EdgePart* part, std::size_t capacity);
  EdgePart* divide(EdgePart* part, std::size_t count);
  void join(EdgePart* part, std::size_t small);
  void link(EdgePart* before, EdgePart* part);

  EdgePart* head_ = nullptr;
  EdgePart* tail_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace hybridcache
