// The entry for libFuzzer: anything that a Walk throws ends the process, and is a finding.
#include "walk.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Walk walk({data, size});
  while (walk.next()) {
  }
  walk.finish();
  walk.verify_nothing_is_left();
  return 0;
}
