#include "hazard.h"

#include <algorithm>
#include <bit>

namespace hybridcache {

namespace {
int log2_bucket(std::int64_t value, int most) {
  return std::min(most, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(value))));
}
}  // namespace

Hazards::Class Hazards::classify(Kind kind, std::int64_t uses, bool passed, std::int64_t turns, std::int64_t gap) {
  const int fresh = passed ? 5 : log2_bucket(turns, 4);
  const int stage = uses > 0 ? 5 + log2_bucket(uses, kStages - 6) : fresh;
  return {kind, static_cast<std::uint8_t>(stage), static_cast<std::uint8_t>(log2_bucket(gap, kGaps - 1))};
}

std::int64_t Hazards::first_age(int bucket) {
  if (bucket < kLinear) return bucket;
  const int octave = (bucket - kLinear) / 4 + 3, quarter = (bucket - kLinear) % 4;
  return (std::int64_t{4} + quarter) << (octave - 2);
}

std::array<Hazards::Table*, 4> Hazards::levels(const Class& which) {
  const int kind = 1 + static_cast<int>(which.kind) * (1 + kStages * (1 + kGaps));
  const int stage = kind + 1 + which.stage * (1 + kGaps);
  std::array<Table*, 4> found{};
  int level = 0;
  for (const int at : {0, kind, stage, stage + 1 + which.gap}) {
    if (!tables_[at]) tables_[at] = std::make_unique<Table>();
    found[level++] = tables_[at].get();
  }
  return found;
}

void Hazards::count(const Class& which, int bucket, std::uint32_t at_risk, std::uint32_t events) {
  for (Table* table : levels(which)) {
    table->at_risk[bucket] += at_risk;
    table->events[bucket] += events;
  }
}

void Hazards::moved(const Class& from, const Class& to, int bucket) {
  const auto before = levels(from), after = levels(to);
  for (int level = 0; level < 4; ++level) {
    if (before[level] == after[level]) continue;
    ++before[level]->at_risk[bucket];
    ++after[level]->at_risk[bucket];
  }
}

// From the root down: first the class above scaled to as many uses as this one has seen in all its ages, then, age by
// age, hazard = (events + weight * scaled hazard) / (spells at risk + weight).
void Hazards::refresh(const std::array<Table*, 4>& levels, Kind kind) {
  std::array<std::uint64_t, kBuckets>& hazard = levels[3]->hazard;
  hazard.fill(kPrior);
  for (int level = 0; level < 4; ++level) {
    const Table* table = levels[level];
    const bool by_kind = level == 1;
    std::uint64_t seen = kUses[level] * kOne / (by_kind ? kRarer[static_cast<int>(kind)] : 1),
                  expected = kUses[level] * kOne;
    for (int b = 0; b < kBuckets; ++b) {
      seen += table->events[b] * kOne;
      expected += table->at_risk[b] * (hazard[b] / 2);
    }
    const auto scale = (seen >> 8) * 256 / std::max<std::uint64_t>(expected >> 16, 1);  // in units of 2**-16
    for (int b = 0; b < kBuckets; ++b) {
      const auto scaled = std::min((hazard[b] * scale) >> 16, kOne);
      const auto spells = std::uint64_t{table->at_risk[b]} + kWeight[level];  // halves
      hazard[b] = std::min(table->events[b] * 2 * kOne / spells + scaled / spells * kWeight[level], kOne);
    }
  }
}

Rate Hazards::index(const Class& which, int bucket, std::int64_t now) {
  const auto found = levels(which);
  Table& leaf = *found[3];
  const auto epoch = now / kRefresh + 1;
  if (leaf.epoch != epoch) {
    refresh(found, which.kind);
    leaf.epoch = epoch;
  }
  if (leaf.indexed[bucket] == epoch) return leaf.index[bucket];
  Rate best = 0;
  std::uint64_t alive = kOne, used = 0, held = 0;
  for (int b = bucket; b < kBuckets; ++b) {
    const auto ends = (alive * (leaf.hazard[b] >> 8)) >> 24;
    const auto width = static_cast<std::uint64_t>(first_age(b + 1) - first_age(b));
    used += ends;
    held += (alive - ends / 2) * width;
    alive -= ends;
    best = std::max(best, (used << kIndexBits) / held);
    if (alive < kOne / 1024) break;
  }
  leaf.indexed[bucket] = epoch;
  return leaf.index[bucket] = best;
}

}  // namespace hybridcache
