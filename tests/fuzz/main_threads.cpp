// Other threads read what csrc/bind.cpp lets them read without its door, stats() and the shape of the arena, while one
// thread walks (walk.h). To be built with -fsanitize=thread. Usage: threads SEED INPUTS
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "walk.h"

namespace {
using Bytes = std::vector<std::uint8_t>;

struct Reads {
  std::atomic<std::int64_t> count{0};
  std::atomic<bool> stop{false};
  std::atomic<bool> wrong{false};
};

void read(const hybridcache::Cache& cache, Reads& reads) {
  const auto slots = cache.arena().num_slots();
  while (!reads.stop) {
    for (const auto& [name, value] : cache.stats()) {
      if (value < 0 || (name == "taken_slots" && value > slots)) reads.wrong = true;
    }
    const auto& arena = cache.arena();
    if (arena.pages_per_slab() < 1 || arena.num_pages() < 1 || arena.num_slots() != slots) reads.wrong = true;
    ++reads.count;
  }
}

std::int64_t walk_beside_readers(const Bytes& input) {
  fuzz::Walk walk(input);
  Reads reads;
  std::thread readers[2];
  for (auto& reader : readers) reader = std::thread([&] { read(walk.cache(), reads); });
  while (reads.count < 2) std::this_thread::yield();
  while (walk.next()) {
  }
  walk.finish();
  reads.stop = true;
  for (auto& reader : readers) reader.join();
  if (reads.wrong) throw fuzz::Finding("stats: a value that was never true, read by another thread");
  return reads.count;
}
}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return std::fputs("usage: threads SEED INPUTS\n", stderr), 2;
  std::mt19937_64 random(std::strtoull(argv[1], nullptr, 10));
  std::printf("seed %s\n", argv[1]);
  const auto inputs = std::strtoll(argv[2], nullptr, 10);
  std::int64_t reads = 0;
  for (std::int64_t i = 0; i < inputs; ++i) {
    Bytes input(400);
    for (auto& byte : input) byte = static_cast<std::uint8_t>(random());
    reads += walk_beside_readers(input);
  }
  std::printf("%lld walks beside readers, %lld reads\n", static_cast<long long>(inputs), static_cast<long long>(reads));
}
