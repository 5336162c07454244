// Prints for each input which edges of the core it reaches: `edges FILE...` gives a line a file, its numbers. To be
// built by clang++ with -fsanitize-coverage=inline-8bit-counters. The corpus is chosen by them (choose.py).
#include <algorithm>
#include <bit>
#include <cstdio>
#include <fstream>
#include <iterator>

#include "walk.h"

namespace {
std::vector<std::span<std::uint8_t>> counters;  // one range a source file
}  // namespace

extern "C" void __sanitizer_cov_8bit_counters_init(std::uint8_t* begin, std::uint8_t* end) {
  counters.emplace_back(begin, end);
}

int main(int argc, char** argv) {
  for (const char* name : std::span(argv + 1, argv + argc)) {
    std::ifstream file(name, std::ios::binary);
    const std::vector<std::uint8_t> input(std::istreambuf_iterator<char>(file), {});
    for (const auto range : counters) std::fill(range.begin(), range.end(), std::uint8_t{0});
    {
      fuzz::Walk walk(input);
      while (walk.next()) {
      }
      walk.finish();
      walk.verify_nothing_is_left();
    }
    std::size_t number = 0;
    for (const auto range : counters) {
      for (const auto count : range) {
        if (count != 0) std::printf("%zu:%d ", number, std::bit_width(count));
        ++number;
      }
    }
    std::printf("\n");
  }
}
