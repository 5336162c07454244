// What was learned of reuse: for each class of boundary, how likely it is asked for at each age. It owns counts and
// nothing else; integers only, so that equal calls learn the same on every rank (I7).
//
// A spell is the time between two uses of a boundary, in requests. A hazard is the share of the spells that reached an
// age bucket which ended in it, and the index of a boundary of age a the best rate of return over every horizon (a
// Gittins index):
//
//     index(a) = max over t of  P(used within (a, a + t]) / E[time that it is held within (a, a + t]]
//
// Where hazards rise with age it waits for the next use, where they fall it forgets like LRU, and where use has no
// memory it keeps a subset. Classes go from coarse to fine, kind > stage > gap, and a class with little data leans on
// the one above it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "types.h"

namespace hybridcache {

// An index, in units of 2**-kIndexBits uses a request.
using Rate = std::uint64_t;
constexpr int kIndexBits = 28;

class Hazards {
 public:
  explicit Hazards(const Options& options) : options_(options) {}

  static constexpr int kLinear = 8;                        // buckets of one request
  static constexpr int kOctaves = 12;                      // then four an octave
  static constexpr int kBuckets = kLinear + 4 * kOctaves;  // the last one has no end
  static constexpr int kTurns = 14, kStages = kTurns + 6, kGaps = 13;
  static constexpr std::int64_t kGapUnit = 8;  // gaps are given in eighths of a request

  // What is known of a boundary when a spell begins.
  struct Class {
    Kind kind;
    std::uint8_t stage;  // never used: by the turns of its conversation; used: by how often
    std::uint8_t gap;  // log2 of the mean of its last spells, or of the one that its conversation has seen; 0: none yet
  };
  static Class classify(Kind kind, std::int64_t uses, bool passed, std::int64_t turns, std::int64_t gap);

  static std::int64_t first_age(int bucket);  // of a bucket

  // A spell has come to this bucket; has gone on from it to the next; has ended in it with a use.
  void entered(const Class& which, int bucket);
  void went_on(const Class& which, int bucket);
  void used(const Class& which, int bucket);
  // It goes on in another class of the same kind.
  void moved(const Class& from, const Class& to, int bucket);

  // At an age of this bucket, as of the last refresh (kRefresh).
  Rate index(const Class& which, int bucket, std::int64_t age, std::int64_t now);
  // The age at which an index is looked up again: that of the next bucket, or where it more than doubles within this
  // one, of its next quarter. REQUIRES: not the last bucket.
  std::int64_t next_look(const Class& which, int bucket, std::int64_t age, std::int64_t now);

 private:
  // Hazards are computed anew after so many requests; in the beginning, after one in kEarly of those seen.
  static constexpr std::int64_t kRefresh = 16, kEarly = 64;
  static constexpr std::uint64_t kOne = 1ULL << 32;        // a probability of one
  static constexpr std::uint64_t kPrior = kOne * 3 / 100;  // hazard of a bucket of which nothing is known
  // How much rarer than a turn end a boundary of each kind is believed to be used, before anything is seen.
  static constexpr std::uint64_t kRarer[kKinds] = {1, 4, 8, 1, 1, 8, 16};
  // How much the class above is trusted, of root, kind, stage and gap: in uses over all ages, and in halves of a spell
  // at each age.
  static constexpr std::uint64_t kUses[4] = {2, 2, 8, 8};
  static constexpr std::uint64_t kWeight[4] = {16, 16, 40, 40};

  struct Table {
    std::array<std::uint32_t, kBuckets> at_risk{}, events{};  // at_risk in halves
    // Of the finest classes only:
    std::array<Table*, 4> levels{};  // from the class of all to this one
    std::array<std::uint64_t, kBuckets> hazard{};
    std::array<Rate, 4 * kBuckets> index{};
    std::array<std::int64_t, 4 * kBuckets> indexed{};  // refreshed + 1 then
    std::int64_t refreshed = -1;                       // the request at which the hazards were computed
  };

  Table& leaf(const Class& which);
  Table& fresh_leaf(const Class& which, std::int64_t now);
  void refresh(Table& leaf, Kind kind);
  Rate index(Table& leaf, int bucket, int behind);
  static int quarters(int bucket, std::int64_t age);
  Rate best_rate(const std::array<std::uint64_t, kBuckets>& hazard, int bucket, int behind) const;

  const Options& options_;
  std::vector<std::unique_ptr<Table>> tables_ =
      std::vector<std::unique_ptr<Table>>(1 + kKinds * (1 + kStages * (1 + kGaps)));
};

}  // namespace hybridcache
