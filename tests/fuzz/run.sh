#!/usr/bin/env bash
# Fuzzes the core with check() after every call, under AddressSanitizer and UndefinedBehaviorSanitizer.
#   tests/fuzz/run.sh SECONDS         from the committed corpus on; what is new stays in build/fuzz/found, a finding in
#                                     build/fuzz/crash-*: replay it with build/fuzz/walk --trace, or python -m
#                                     tests.fuzz.replay, and shorten it with build/fuzz/fuzz -minimize_crash=1
#   tests/fuzz/run.sh corpus PYTHON   chooses the corpus anew out of it and of what was found
# Without libFuzzer (clang++) g++ builds the same walk, for random inputs and changes of those of the corpus.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/fuzz
mkdir -p $out/found tests/fuzz/corpus
checks="-O2 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS"

has_libfuzzer() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' > $out/probe.cpp
  clang++ -fsanitize=fuzzer $out/probe.cpp -o $out/probe 2> /dev/null
}

if [[ ${1:-} = corpus ]]; then
  tests/fuzz/build.sh $out/edges clang++ "-O1 -fsanitize-coverage=inline-8bit-counters" edges
  exec "$2" -m tests.fuzz.choose $out/edges/edges $out/found
elif has_libfuzzer; then
  tests/fuzz/build.sh $out clang++ "$checks -fsanitize=fuzzer-no-link" walk fuzz
  $out/fuzz -max_total_time="$1" -max_len=400 -artifact_prefix=$out/ -print_final_stats=1 $out/found tests/fuzz/corpus 2> $out/log ||
    { tail -40 $out/log; exit 1; }
  echo "fuzz: no finding; $(tail -12 $out/log | grep -E 'number_of_executed_units' | tr -s ' ')"
else
  echo "fuzz: no clang++ with libFuzzer here, g++ runs random inputs instead"
  tests/fuzz/build.sh $out g++ "$checks" walk
  $out/walk --random "$RANDOM" "$1" $out/crash-input tests/fuzz/corpus/*
fi
