// Runs inputs without libFuzzer: `walk [--digest | --trace] FILE...` replays files, and prints the digest that each
// ends at, or every call with the tree after it. `walk --random SEED SECONDS KEEP FILE...` makes inputs for so long, of
// random bytes or by changing those of the files; the one that it runs lies in the file KEEP, so that it is there when
// it dies.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

#include "walk.h"

namespace {
using Bytes = std::vector<std::uint8_t>;
using Files = std::span<char*>;

Bytes read(const char* name) {
  std::ifstream file(name, std::ios::binary);
  if (!file) throw std::runtime_error(std::string(name) + ": cannot be read");
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

std::uint64_t run(const Bytes& input, bool trace) {
  fuzz::Walk walk(input, trace);
  while (walk.next()) {
  }
  walk.finish();
  const auto digest = walk.cache().digest();
  walk.verify_nothing_is_left();
  return digest;
}

Bytes make(std::mt19937_64& random, const std::vector<Bytes>& known) {
  Bytes input(16 + random() % 500);
  for (auto& byte : input) byte = static_cast<std::uint8_t>(random());
  if (known.empty() || random() % 2 == 0) return input;
  Bytes changed = known[random() % known.size()];
  const auto cut = random() % (changed.size() + 1);
  changed.insert(changed.begin() + static_cast<std::ptrdiff_t>(cut), input.begin(), input.begin() + random() % 16);
  for (auto n = random() % 4; n > 0; --n) changed[random() % changed.size()] = static_cast<std::uint8_t>(random());
  return changed;
}

int run_random(std::uint64_t seed, double seconds, const char* keep, Files files) {
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  std::vector<Bytes> known;
  for (const char* file : files) known.push_back(read(file));
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::int64_t inputs = 0;
  for (; inputs == 0 || std::chrono::steady_clock::now() < until; ++inputs) {
    const Bytes input = make(random, known);
    std::ofstream(keep, std::ios::binary)
        .write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size()));
    run(input, false);
  }
  std::remove(keep);
  std::printf("%lld inputs without a finding\n", static_cast<long long>(inputs));
  return 0;
}
}  // namespace

int main(int argc, char** argv) {
  const std::string how = argc > 1 ? argv[1] : "";
  if (how == "--random" && argc > 4)
    return run_random(std::strtoull(argv[2], nullptr, 10), std::atof(argv[3]), argv[4], Files(argv + 5, argv + argc));
  const bool digest = how == "--digest", trace = how == "--trace";
  const Files files(argv + 1 + (digest || trace), argv + argc);
  for (const char* file : files) {
    const auto end = run(read(file), trace);
    if (digest) std::printf("%s %llu\n", file, static_cast<unsigned long long>(end));
  }
  if (!digest) std::printf("%zu inputs replayed\n", files.size());
}
