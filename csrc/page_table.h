// The pages of a lease, in order. It owns them as numbers, and shares them with whoever looks: entries never change,
// so a view stays right while the table grows, in place or, where that would move what others see, into a copy.
#pragma once

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "types.h"

namespace hybridcache {

class PageTable {
 public:
  using Pages = std::vector<PageId>;

  PageTable() = default;
  PageTable(PageTable&&) = default;  // a copy would share entries
  PageTable& operator=(PageTable&&) = default;

  std::size_t size() const { return pages_->size(); }
  std::size_t capacity() const { return pages_->capacity(); }
  PageId operator[](std::size_t number) const { return (*pages_)[number]; }
  PageId back() const { return pages_->back(); }
  auto begin() const { return std::as_const(*pages_).begin(); }
  auto end() const { return std::as_const(*pages_).end(); }
  operator std::span<const PageId>() const { return *pages_; }
  std::shared_ptr<const Pages> share() const { return pages_; }

  // Empties it, to be filled with `size` entries; what others see stays with them. All else REQUIRES that this came
  // first.
  Pages& anew(std::size_t size) {
    if (pages_.use_count() != 1) pages_ = std::make_shared<Pages>();
    pages_->clear();
    pages_->reserve(size);
    return *pages_;
  }

  void push_back(PageId page) {
    if (pages_->size() == pages_->capacity() && pages_.use_count() > 1) {
      auto grown = std::make_shared<Pages>();
      grown->reserve(2 * pages_->size());
      grown->assign(pages_->begin(), pages_->end());
      pages_ = std::move(grown);
    }
    pages_->push_back(page);
  }

 private:
  std::shared_ptr<Pages> pages_;
};

}  // namespace hybridcache
