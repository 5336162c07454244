// Which records are due at which request: a ring of lists, one a request. It owns the lists and no record. To enter a
// record, to move it and to strike it out costs O(1) and no memory; those of one request come in the order in which
// they were entered.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <vector>

namespace hybridcache {

struct Record;

class Calendar {
 public:
  static constexpr std::int64_t kNever = INT64_MAX;
  static constexpr std::int64_t kFarthest = 4096;  // requests ahead; who is due later asks again then

  // A record's place in it: `days` is the list that it stands in.
  struct Place {
    std::list<Record*>* day = nullptr;
    std::list<Record*>::iterator at{};
  };

  Place enter(Record* record) { return {&idle_, idle_.insert(idle_.end(), record)}; }  // due never
  void move(Place& place, std::int64_t now, std::int64_t due) {
    auto& day = due == kNever ? idle_ : days_[std::min(due, now + kFarthest) % std::ssize(days_)];
    day.splice(day.end(), *place.day, place.at);
    place.day = &day;
  }
  void strike(const Place& place) { place.day->erase(place.at); }
  // The first that is due at `now`, which never goes on by more than one; null if there is none (left).
  Record* due(std::int64_t now) const {
    const auto& day = days_[now % std::ssize(days_)];
    return day.empty() ? nullptr : day.front();
  }

 private:
  std::vector<std::list<Record*>> days_ = std::vector<std::list<Record*>>(kFarthest + 1);
  std::list<Record*> idle_;
};

}  // namespace hybridcache
