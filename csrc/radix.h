// What every radix tree of tokens does, whatever its nodes own: comparing an edge, and finding a child by the first
// token of its edge.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>

#include "edge.h"
#include "types.h"

namespace hybridcache {

// Length of the common prefix: one memcmp of what is left, in long strides; where they differ over shorter ones, then
// token by token.
inline std::size_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
  constexpr std::size_t kLongest = 4096;
  const auto n = std::min(a.size(), b.size());
  std::size_t i = 0;
  const auto go_on = [&](std::size_t stride) {
    const bool equal = std::memcmp(a.data() + i, b.data() + i, stride * sizeof(Token)) == 0;
    if (equal) i += stride;
    return equal;
  };
  while (i < n && go_on(std::min(kLongest, n - i))) {
  }
  for (const std::size_t stride : {128, 16}) {
    while (i + stride <= n && go_on(stride)) {
    }
  }
  while (i < n && a[i] == b[i]) ++i;
  return i;
}

inline std::size_t common_prefix(TokenRange a, std::span<const Token> b) {
  std::size_t common = 0;
  for (auto left = a; !left.empty(); left = left.rest()) {
    const auto here = common_prefix(left.head(), b.subspan(common));
    common += here;
    if (here < left.head().size()) break;
  }
  return common;
}

// Where the child whose edge begins with `first` stands, or belongs; children are (first token, node), in order.
auto child_position(auto& children, Token first) {
  return std::lower_bound(children.begin(), children.end(), first,
                          [](const auto& child, Token token) { return child.first < token; });
}

// That child, or null.
auto child_at(const auto& children, Token first) {
  const auto at = child_position(children, first);
  return at != children.end() && at->first == first ? at->second : nullptr;
}

}  // namespace hybridcache
