// What every radix tree of tokens does, whatever its nodes own: comparing an edge, and finding a child by the first
// token of its edge.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>

#include "types.h"

namespace hybridcache {

// Length of the common prefix: memcmp over strides, then token by token in the stride that differs.
inline std::size_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
  constexpr std::size_t kStride = 1024;
  const auto n = std::min(a.size(), b.size());
  std::size_t i = 0;
  while (i + kStride <= n && std::memcmp(&a[i], &b[i], kStride * sizeof(Token)) == 0) i += kStride;
  const auto end = a.begin() + std::min(n, i + kStride);
  return i + (std::mismatch(a.begin() + i, end, b.begin() + i).first - (a.begin() + i));
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
