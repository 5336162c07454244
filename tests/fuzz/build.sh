#!/usr/bin/env bash
# Builds the core without Python, and the programs of this folder on it: OUT/walk, OUT/threads, OUT/teardown; with
# -fsanitize=fuzzer-no-link in FLAGS also OUT/fuzz. Usage: tests/fuzz/build.sh OUT COMPILER FLAGS [PROGRAM...]
set -euo pipefail
mkdir -p "$1" && out=$(realpath "$1") && compiler=$2 flags=$3
shift 3
programs=${*:-walk}
cd "$(dirname "$0")/../.."
[[ $programs = teardown ]] && parts="" || parts="walk decode bad_calls"  # teardown has its own scene
sources=$(ls csrc/*.cpp | grep -v bind.cpp; for name in $parts; do echo tests/fuzz/$name.cpp; done)
mains=$(for name in $programs; do echo "tests/fuzz/main_$name.cpp"; done)
printf '%s\n' $sources $mains | xargs -P 2 -I{} sh -c "$compiler -std=c++20 -Wall -Wextra $flags -Icsrc -c {} -o $out/\$(basename {} .cpp).o"
common=$(for source in $sources; do echo "$out/$(basename "$source" .cpp).o"; done)
for name in $programs; do
  $compiler ${flags/fuzzer-no-link/$([[ $name = fuzz ]] && echo fuzzer || echo fuzzer-no-link)} $common "$out/main_$name.o" -o "$out/$name" -pthread
done
