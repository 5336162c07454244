#include "placement.h"

#include <algorithm>

namespace hybridcache {

std::span<const Wanted> Course::wanted_in(Position from, Position to) const {
  const auto before = [](Position position, const Wanted& wanted) { return position < wanted.position; };
  const auto first = std::upper_bound(wanted.begin(), wanted.end(), from, before);
  return {first, std::upper_bound(first, wanted.end(), to, before)};
}

void Course::want_breakpoint(Position position) {
  const auto below = [](const Wanted& each, Position at) { return each.position < at; };
  auto at = std::lower_bound(wanted.begin(), wanted.end(), position, below);
  if (at == wanted.end() || at->position != position) at = wanted.insert(at, {position, Kind::breakpoint});
  *at = {position, Kind::breakpoint};
}

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
  // One sharer saves kv_length - start tokens; each that left the path here before is one more.
  if (match.ways > 0 && match.kv_length > course.start && (match.kv_length - course.start) * match.ways >= cost) {
    wanted.push_back({match.kv_length, Kind::fork});
  }
  for (const Position position : {course.left, course.again}) {
    if (position > course.start && position < length && position - course.start >= cost)
      wanted.push_back({position, Kind::fork});
  }
  if (options_.inner_checkpoints && options_.policy != Policy::marconi) {
    if (course.branches && length - kCutGap > course.start)
      wanted.push_back({length - kCutGap, Kind::cut, !enabled(Kind::cut)});
    add_interior(course);
  }
  // Kinds were added in the order of precedence, which a stable sort keeps among equals.
  std::stable_sort(wanted.begin(), wanted.end(),
                   [](const Wanted& a, const Wanted& b) { return a.position < b.position; });
  const auto same = [](const Wanted& a, const Wanted& b) { return a.position == b.position; };
  wanted.erase(std::unique(wanted.begin(), wanted.end(), same), wanted.end());
}

void Placement::add_interior(Course& course) {
  const auto first = course.wanted.size();
  for (Position at = options_.interior_spacing; at < course.prompt_length; at *= 2) {
    if (at > course.start) course.wanted.push_back({at, Kind::interior});
  }
  if (course.wanted.size() == first) return;
  const bool spare = !enabled(Kind::interior);
  for (auto at = first; at < course.wanted.size(); ++at) course.wanted[at].spare = spare;
}

// Where a wanted position takes effect in a step [begin, end), `begin` itself if nowhere. A paid cut falls on begin +
// alignment * k, where a resumed scan is bitwise that of the run that made it; the end of the step is free as it is.
Position Placement::effective(Position begin, Position end, Position wanted) const {
  if (wanted == end) return end;
  return begin + (wanted - begin) / options_.alignment * options_.alignment;
}

bool Placement::ask(Kind kind, Cut& cut) const {
  cut.asked.push_back(kind);
  return would_enable(kind);
}

void Placement::taken(const Cut& cut) {
  for (const Kind kind : cut.asked) ++asked_[index(kind)];
}

// The wanted positions that take effect in (begin, end], ascending, one kind each.
std::vector<Wanted> Placement::inside(const Course& course, Position begin, Position end) const {
  std::vector<Wanted> inside;
  for (const auto& wanted : course.wanted_in(begin, end)) {
    const auto at = effective(begin, end, wanted.position);
    if (at > begin && (inside.empty() || at > inside.back().position))
      inside.push_back({at, wanted.kind, wanted.spare});
  }
  return inside;
}

// Whether a prompt that was sent before, or branches off, runs through in one step, so that no chunk end below its end
// will serve a resend.
bool Placement::cut_before_end(const Course& course, Position begin, Position end) const {
  const auto saved = course.prompt_length - kCutGap - begin;
  return (course.resend || course.branches) && begin == course.start && end == course.prompt_length &&
         saved >= std::max<Position>(options_.pass_cost, 1);
}

// A boundary that costs no pass: the end of the prompt, the last chunk below it, or one of the sparse chunk ends.
std::optional<Kind> Placement::free_boundary(const Course& course, Position last, Position begin, Position end) const {
  if (options_.policy == Policy::marconi) return std::nullopt;  // branch-offs and the last decoded token only
  if (end == course.prompt_length) return Kind::prompt_end;
  if (end > course.prompt_length) return std::nullopt;
  const bool probably_last = course.prompt_length - end <= end - begin;
  const bool sparse = end >= options_.interior_spacing && end >= 2 * last;
  return probably_last || sparse ? std::optional(Kind::chunk_end) : std::nullopt;
}

// Ends the step at the first wanted position inside it whose state could be kept, at the price of one more pass.
void Placement::shorten(const Course& course, Cut& cut, Position begin, std::vector<Wanted> candidates,
                        const Room& room) const {
  // A resend is evidence; of a first-time prompt only experience can tell.
  if (options_.policy != Policy::marconi && cut_before_end(course, begin, cut.end) &&
      (course.resend || ask(Kind::cut, cut))) {
    const Wanted before_end{effective(begin, cut.end, cut.end - kCutGap), Kind::cut};
    const auto after = [](const Wanted& a, const Wanted& b) { return a.position < b.position; };
    if (before_end.position > begin)
      candidates.insert(std::upper_bound(candidates.begin(), candidates.end(), before_end, after), before_end);
  }
  for (const auto& candidate : candidates) {
    const bool paid = candidate.position < cut.end;
    if (paid && !(replaces_any(candidate.kind) ? room.for_any : room.for_superseded)) continue;
    cut.end = candidate.position;
    cut.kind = candidate.kind;
    cut.extra_pass = paid;
    return;
  }
}

Cut Placement::cut(const Course& course, Position last, Position begin, Position end, const Room& room) const {
  Cut cut;
  cut.end = end;
  auto wanted = inside(course, begin, end);
  if (!options_.inner_checkpoints) {
    shorten(course, cut, begin, std::move(wanted), room);
  } else {
    if (!wanted.empty() && wanted.back().position == end) {
      cut.kind = wanted.back().kind;
      cut.spare = wanted.back().spare;
      wanted.pop_back();
    }
    cut.inner = std::move(wanted);
  }
  if (cut.kind) return cut;
  cut.kind = free_boundary(course, last, begin, cut.end);
  if (cut.kind) cut.spare = !ask(*cut.kind, cut);
  return cut;
}

}  // namespace hybridcache
