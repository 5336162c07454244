#include "hazard.h"

#include <algorithm>
#include <bit>

namespace hybridcache {

namespace {
int log2_bucket(std::int64_t value, int most) {
  return std::min(most, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(value))));
}
// 0, 1, 2, 3, 4-5, 6-7, 8-11, 12-15 ..
int half_octave(std::int64_t value, int most) {
  if (value < 2) return static_cast<int>(value);
  const int bits = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(value)));
  return static_cast<int>(std::min<std::int64_t>(most, 2 * bits - 2 + ((value >> (bits - 2)) & 1)));
}
}  // namespace

Hazards::Class Hazards::classify(Kind kind, std::int64_t uses, bool passed, std::int64_t turns, std::int64_t gap) {
  const int fresh = passed ? kTurns : half_octave(turns, kTurns - 1);
  const int stage = uses > 0 ? kTurns + log2_bucket(uses, kStages - 1 - kTurns) : fresh;
  return {kind, static_cast<std::uint8_t>(stage), static_cast<std::uint8_t>(log2_bucket(gap / kGapUnit, kGaps - 1))};
}

std::int64_t Hazards::first_age(int bucket) {
  if (bucket < kLinear) return bucket;
  const int octave = (bucket - kLinear) / 4 + 3, quarter = (bucket - kLinear) % 4;
  return (std::int64_t{4} + quarter) << (octave - 2);
}

// A class's own table, and through it those of the classes above.
Hazards::Table& Hazards::leaf(const Class& which) {
  const int stage_of = options_.has(Part::stages) ? which.stage : 0, gap_of = options_.has(Part::gaps) ? which.gap : 0;
  const int kind = 1 + static_cast<int>(which.kind) * (1 + kStages * (1 + kGaps));
  const int stage = kind + 1 + stage_of * (1 + kGaps);
  const std::array<int, 4> path = {0, kind, stage, stage + 1 + gap_of};
  if (tables_[path[3]]) return *tables_[path[3]];
  std::array<Table*, 4> levels{};
  for (int level = 0; level < 4; ++level) {
    if (!tables_[path[level]]) tables_[path[level]] = std::make_unique<Table>();
    levels[level] = tables_[path[level]].get();
  }
  levels[3]->levels = levels;
  return *levels[3];
}

void Hazards::entered(const Class& which, int bucket) {
  for (Table* table : leaf(which).levels) ++table->at_risk[bucket];
}

void Hazards::went_on(const Class& which, int bucket) {
  for (Table* table : leaf(which).levels) {
    ++table->at_risk[bucket];
    ++table->at_risk[bucket + 1];
  }
}

void Hazards::used(const Class& which, int bucket) {
  for (Table* table : leaf(which).levels) {
    ++table->at_risk[bucket];
    ++table->events[bucket];
  }
}

void Hazards::moved(const Class& from, const Class& to, int bucket) {
  const auto &before = leaf(from).levels, &after = leaf(to).levels;
  for (int level = 0; level < 4; ++level) {
    if (before[level] == after[level]) continue;
    ++before[level]->at_risk[bucket];
    ++after[level]->at_risk[bucket];
  }
}

// From the root down: first the class above scaled to as many uses as this one has seen in all its ages, then, age by
// age, hazard = (events + weight * scaled hazard) / (spells at risk + weight).
void Hazards::refresh(Table& leaf, Kind kind) {
  auto& hazard = leaf.hazard;
  hazard.fill(kPrior);
  for (int level = 0; level < 4; ++level) {
    const Table* table = leaf.levels[level];
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
      hazard[b] = std::min((table->events[b] * 2 * kOne + scaled * kWeight[level]) / spells, kOne);
    }
  }
}

// How many quarters of the bucket are behind at this age; of one without an end at most three.
int Hazards::quarters(int bucket, std::int64_t age) {
  const auto first = first_age(bucket), width = first_age(bucket + 1) - first;
  return static_cast<int>(std::min<std::int64_t>((age - first) * 4 / width, 3));
}

std::int64_t Hazards::next_look(const Class& which, int bucket, std::int64_t age, std::int64_t now) {
  const auto first = first_age(bucket), width = first_age(bucket + 1) - first;
  Table& leaf = fresh_leaf(which, now);
  const bool steep = index(leaf, bucket + 1, 0) > 2 * index(leaf, bucket, 0);
  return first + (steep ? ((quarters(bucket, age) + 1) * width + 3) / 4 : width);
}

Hazards::Table& Hazards::fresh_leaf(const Class& which, std::int64_t now) {
  Table& leaf = this->leaf(which);
  if (leaf.refreshed < 0 || now - leaf.refreshed >= std::clamp<std::int64_t>(now / kEarly, 1, kRefresh)) {
    refresh(leaf, which.kind);
    leaf.refreshed = now;
  }
  return leaf;
}

Rate Hazards::index(const Class& which, int bucket, std::int64_t age, std::int64_t now) {
  return index(fresh_leaf(which, now), bucket, quarters(bucket, age));
}

Rate Hazards::index(Table& leaf, int bucket, int behind) {
  const int at = 4 * bucket + behind;
  if (leaf.indexed[at] == leaf.refreshed + 1) return leaf.index[at];
  leaf.indexed[at] = leaf.refreshed + 1;
  return leaf.index[at] = best_rate(leaf.hazard, bucket, behind);
}

Rate Hazards::best_rate(const std::array<std::uint64_t, kBuckets>& hazard, int bucket, int behind) const {
  auto ends = hazard[bucket] - hazard[bucket] / 4 * behind;  // uses are spread evenly over a bucket
  std::uint64_t alive = kOne - hazard[bucket] / 4 * behind, used = 0, held = 0;
  unsigned __int128 best_used = 0, best_held = 1;  // compared without a division
  int quarters = 4 - behind;
  for (int b = bucket;; quarters = 4) {
    used += ends;
    held += (alive - ends / 2) * (static_cast<std::uint64_t>(first_age(b + 1) - first_age(b)) * quarters / 4);
    alive -= ends;
    if (used * best_held > best_used * held) {
      best_used = used;
      best_held = held;
    }
    if (++b == kBuckets || alive < kOne / 1024 || !options_.has(Part::horizon)) break;
    ends = (alive * (hazard[b] >> 8)) >> 24;
  }
  return static_cast<Rate>((best_used << kIndexBits) / best_held);
}

}  // namespace hybridcache
