#!/usr/bin/env bash
# Builds the core with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize, beside copies of the package and the tests, and
# runs the tests of the core there, then a random walk against the oracle. Usage: tests/sanitize.sh PYTHON [ACTIONS]
set -euo pipefail
python=$(realpath -s "${1:-python3}")
actions=${2:-4000}
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

cd $out
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc UBSAN_OPTIONS=print_stacktrace=1
"$python" -c "import hybridcache._core as core; assert 'sanitize' in core.__file__, core.__file__"
"$python" -m pytest -q -p no:cacheprovider tests/test_invariants.py tests/test_placement.py tests/test_run_ahead.py tests/test_regressions.py
"$python" -m tests.stress --actions "$actions"
