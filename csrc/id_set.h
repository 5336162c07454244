// A set of ids in [0, n), the lowest first: a bit for each, and above each word of bits one more that says whether it
// has any. To insert, to erase and to find the lowest costs O(log64 n) and no memory.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace hybridcache {

class IdSet {
 public:
  explicit IdSet(std::int64_t n = 0) {
    do {
      n = (n + 63) / 64;
      levels_.emplace_back(n, 0);
    } while (n > 1);
  }

  std::int64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  bool holds(std::int64_t id) const { return (levels_.front()[id / 64] & bit(id)) != 0; }
  // REQUIRES: it does not hold it.
  void insert(std::int64_t id) {
    ++size_;
    for (auto& words : levels_) {
      auto& word = words[id / 64];
      const bool had_any = word != 0;
      word |= bit(id);
      if (had_any) return;  // so it is known above
      id /= 64;
    }
  }
  // REQUIRES: it holds it.
  void erase(std::int64_t id) {
    --size_;
    for (auto& words : levels_) {
      auto& word = words[id / 64];
      word &= ~bit(id);
      if (word != 0) return;
      id /= 64;
    }
  }
  // REQUIRES: not empty.
  std::int32_t first() const {
    std::int64_t id = 0;
    for (auto words = levels_.rbegin(); words != levels_.rend(); ++words) id = 64 * id + std::countr_zero((*words)[id]);
    return static_cast<std::int32_t>(id);
  }

 private:
  static std::uint64_t bit(std::int64_t id) { return std::uint64_t{1} << id % 64; }

  std::vector<std::vector<std::uint64_t>> levels_;  // of ids, of words of ids, and so on up to one word
  std::int64_t size_ = 0;
};

}  // namespace hybridcache
