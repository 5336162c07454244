#include "placement.h"

#include <algorithm>

namespace hybridcache {

bool Placement::would_enable(Kind kind) const {
  const int k = index(kind);
  return made_[k] < kTrial || kWorth * used_[k] >= made_[k] || (asked_[k] + 1) % kTrial == 0;
}

bool Placement::enabled(Kind kind) {
  const bool yes = would_enable(kind);
  ++asked_[index(kind)];
  return yes;
}

void Placement::made(Kind kind) {
  const int k = index(kind);
  if (++made_[k] < kMemory) return;
  made_[k] /= 2;
  used_[k] /= 2;
}

void Placement::want(Course& course, const Match& match, std::span<const Position> breakpoints) {
  auto& wanted = course.wanted;
  const auto length = course.prompt_length;
  for (const Position position : breakpoints) {
    if (position > course.start) wanted.push_back({position, Kind::breakpoint});
  }
  const auto cost = options_.inner_checkpoints ? 0 : options_.pass_cost;
  if (match.diverged && match.kv_length < length && match.kv_length > course.start &&
      match.kv_length - course.start >= cost) {
    wanted.push_back({match.kv_length, Kind::fork});
  }
  if (options_.inner_checkpoints) {
    if (course.branches && length - kCutGap > course.start && enabled(Kind::cut))
      wanted.push_back({length - kCutGap, Kind::cut});
    add_interior(course);
  }
  // Kinds were added in the order of precedence, which a stable sort keeps among equals.
  std::stable_sort(wanted.begin(), wanted.end(),
                   [](const Wanted& a, const Wanted& b) { return a.position < b.position; });
  const auto same = [](const Wanted& a, const Wanted& b) { return a.position == b.position; };
  wanted.erase(std::unique(wanted.begin(), wanted.end(), same), wanted.end());
}

void Placement::add_interior(Course& course) {
  std::vector<Wanted> interior;
  for (Position at = options_.interior_spacing; at < course.prompt_length; at *= 2) {
    if (at > course.start) interior.push_back({at, Kind::interior});
  }
  if (!interior.empty() && enabled(Kind::interior))
    course.wanted.insert(course.wanted.end(), interior.begin(), interior.end());
}

// Where a wanted position takes effect in a step [begin, end), `begin` itself if nowhere. A paid cut falls on begin +
// alignment * k, where a resumed scan is bitwise that of the run that made it; the end of the step is free as it is.
Position Placement::effective(Position begin, Position end, Position wanted) const {
  if (wanted == end) return end;
  return begin + (wanted - begin) / options_.alignment * options_.alignment;
}

Cut Placement::cut(const Course& course, Position begin, Position end) const {
  Cut cut{end, std::nullopt, {}};
  std::vector<Wanted> inside;  // effective positions in (begin, end], ascending
  for (const auto& wanted : course.wanted) {
    if (wanted.position <= begin) continue;
    if (wanted.position > end) break;
    const auto at = effective(begin, end, wanted.position);
    if (at > begin && (inside.empty() || at > inside.back().position)) inside.push_back({at, wanted.kind});
  }
  if (options_.inner_checkpoints) {
    if (!inside.empty() && inside.back().position == end) {
      cut.kind = inside.back().kind;
      inside.pop_back();
    }
    cut.inner = std::move(inside);
    return cut;
  }
  const auto before_end = course.prompt_length - kCutGap;
  const bool runs_through = begin == course.start && end == course.prompt_length;
  if (course.branches && runs_through && before_end - begin >= std::max<Position>(options_.pass_cost, 1)) {
    const auto at = effective(begin, end, before_end);
    cut.asked_cut = true;
    if (would_enable(Kind::cut) && at > begin && (inside.empty() || at < inside.front().position))
      inside.insert(inside.begin(), {at, Kind::cut});
  }
  if (inside.empty()) return cut;
  cut.end = inside.front().position;
  cut.kind = inside.front().kind;
  cut.extra_pass = cut.end < end;
  return cut;
}

std::optional<Kind> Placement::boundary_at(const Course& course, const std::optional<Kind>& remembered, Position begin,
                                           Position end) {
  if (remembered) return remembered;
  if (end == course.prompt_length) return enabled(Kind::prompt_end) ? std::optional(Kind::prompt_end) : std::nullopt;
  if (end > course.prompt_length) return std::nullopt;
  const bool probably_last = course.prompt_length - end <= end - begin;
  const bool sparse = end >= options_.interior_spacing && end >= 2 * course.boundary;
  if ((probably_last || sparse) && enabled(Kind::chunk_end)) return Kind::chunk_end;
  return std::nullopt;
}

}  // namespace hybridcache
