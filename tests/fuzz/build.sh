#!/usr/bin/env bash
# Builds the core without Python, and the programs of this folder on it: OUT/walk, OUT/threads, OUT/teardown; with
# -fsanitize=fuzzer-no-link in FLAGS also OUT/fuzz. Usage: tests/fuzz/build.sh OUT COMPILER FLAGS [PROGRAM...]
# Objects in OUT that are newer than their source and all headers, and of the same flags, are used again; so are those of
# the core in the folder CORE_OBJECTS, whatever their flags.
set -euo pipefail
mkdir -p "$1" && out=$(realpath "$1") && compiler=$2 flags=$3
shift 3
programs=${*:-walk}
cd "$(dirname "$0")/../.."
[[ $programs = teardown ]] && parts="" || parts="walk decode sessions bad_calls"  # teardown has its own scene
sources=$(ls csrc/*.cpp | grep -v bind.cpp; for name in $parts; do echo tests/fuzz/$name.cpp; done)
mains=$(for name in $programs; do echo "tests/fuzz/main_$name.cpp"; done)

how="$compiler -std=c++20 -Wall -Wextra $flags -Icsrc"
[[ $(cat "$out/built-with" 2> /dev/null) = "$how" ]] || { rm -f "$out"/*.o && echo "$how" > "$out/built-with"; }
core_header=$(ls -t csrc/*.h | head -1) own_header=$(ls -t csrc/*.h tests/fuzz/*.h | head -1)
is_fresh() {
  [[ $2 = csrc/* ]] && header=$core_header || header=$own_header
  [[ $1 -nt $2 && $1 -nt $header ]]
}
object() {
  local built=${CORE_OBJECTS:-none}/$(basename "$1" .cpp).o
  [[ $1 = csrc/* ]] && is_fresh "$built" "$1" && echo "$built" || echo "$out/$(basename "$1" .cpp).o"
}
for source in $sources $mains; do
  is_fresh "$(object "$source")" "$source" || echo "$source $(object "$source")"
done | xargs -r -P 2 -L 1 sh -c "$how -c \$0 -o \$1.new && mv \$1.new \$1"
common=$(for source in $sources; do object "$source"; done)
for name in $programs; do
  $compiler ${flags/fuzzer-no-link/$([[ $name = fuzz ]] && echo fuzzer || echo fuzzer-no-link)} $common "$out/main_$name.o" -o "$out/$name" -pthread
done
