#!/usr/bin/env bash
# Builds the core with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize, beside copies of the package and the tests, and
# runs the tests of the core there, a random walk against the oracle, the fuzzer's corpus and FUZZ seconds of random
# inputs. Then ThreadSanitizer for what other threads may read, and valgrind for teardown in the middle of everything.
# Usage: tests/sanitize.sh PYTHON [ACTIONS] [FUZZ]
set -euo pipefail
python=$(realpath -s "${1:-python3}")
actions=${2:-4000} fuzz=${3:-5}
cd "$(dirname "$0")/.."
out=build/sanitize
rm -rf $out && mkdir -p $out/hybridcache
cp hybridcache/*.py $out/hybridcache/
cp -r tests pyproject.toml README.md csrc docs $out/
suffix=$("$python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
flags="-std=c++20 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS -fPIC -fvisibility=hidden"
includes="$("$python" -m pybind11 --includes) -Icsrc"
printf '%s\n' csrc/*.cpp | xargs -P 2 -I{} sh -c "g++ $flags $includes -c {} -o $out/\$(basename {}).o"
g++ $flags -shared $out/*.o -o "$out/hybridcache/_core$suffix"

driver="-std=c++20 -O1 -g1 -fsanitize=address -D_GLIBCXX_ASSERTIONS -Icsrc"
mkdir $out/walks
printf '%s\n' walk decode bad_calls sessions main_walk |
  xargs -P 2 -I{} g++ $driver -c tests/fuzz/{}.cpp -o $out/walks/{}.o
g++ $flags $(ls $out/*.o | grep -v bind) $out/walks/*.o -o $out/walk
$out/walk tests/fuzz/corpus/*
$out/walk --random "$RANDOM" "$fuzz" $out/crash-input tests/fuzz/corpus/* || { base64 $out/crash-input; exit 1; }

tests/fuzz/build.sh $out/thread g++ "-O1 -g1 -fsanitize=thread" threads
fixed=$(setarch -R true 2> /dev/null && echo "setarch -R" || true) # some kernels place memory where it cannot follow
$fixed $out/thread/threads "$RANDOM" 20
if command -v valgrind > /dev/null; then
  tests/fuzz/build.sh $out/teardown g++ "-O1 -g1" teardown
  valgrind -q --error-exitcode=1 --leak-check=full --show-leak-kinds=all --errors-for-leak-kinds=all $out/teardown/teardown
else
  echo "sanitize: no valgrind here, teardown is not run under it"
fi

cd $out
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc UBSAN_OPTIONS=print_stacktrace=1
"$python" -c "import hybridcache._core as core; assert 'sanitize' in core.__file__, core.__file__"
"$python" -m pytest -q -p no:cacheprovider tests/test_invariants.py tests/test_placement.py tests/test_run_ahead.py tests/test_regressions.py
"$python" -m tests.stress --actions "$actions"
