"""One environment a peer under build/peers: `python -m benchmarks.peers.environments [PEER...]`.

Owns the pinned versions and what their modules need to be imported, far less than they declare: a CPU torch
and no CUDA. A peer that cannot be set up here leaves the reason in its folder, and the benchmark prints it in
place of figures. `measure` runs a peer's script in its environment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "peers"
TORCH = "torch==2.13.0"


class Peer(NamedTuple):
    wheel: str
    alone: tuple[str, ...] = ()  # installed without what they ask for
    needs: tuple[str, ...] = ()  # installed with it


PEERS = {
    "sglang": Peer(
        "sglang==0.5.23",
        alone=("compressed-tensors==0.18.0", "apache-tvm-ffi==0.1.11", "openai", "gguf"),
        needs=(
            TORCH,
            "transformers==5.19.0",
            *(
                "aiohttp",
                "anyio",
                "dill",
                "distro",
                "httpx",
                "ipython",
                "jiter",
                "loguru",
                "msgspec",
                "numpy",
            ),
            *(
                "orjson",
                "packaging",
                "partial_json_parser",
                "pillow",
                "psutil",
                "pybase64",
                "pydantic",
                "pyzmq",
            ),
            *("requests", "sentencepiece", "sniffio", "starlette", "tqdm", "triton"),
        ),
    ),
    "vllm": Peer(
        "vllm==0.33.0",
        alone=("apache-tvm-ffi==0.1.11", "llguidance", "openai", "xgrammar"),
        needs=(
            TORCH,
            "transformers==5.19.0",
            *(
                "aiohttp",
                "cachetools",
                "cbor2",
                "cloudpickle",
                "distro",
                "fastapi",
                "httpx",
                "jiter",
                "msgspec",
            ),
            *("numpy", "openai_harmony", "opentelemetry-api", "opentelemetry-sdk", "packaging"),
            *("partial_json_parser", "pillow", "prometheus-client", "psutil", "py-cpuinfo", "pybase64"),
            *("pydantic", "pyzmq", "regex", "requests", "sniffio", "tqdm", "uvloop"),
        ),
    ),
    "tokenspeed": Peer("tokenspeed-scheduler==0.1.42"),
}


def python(name: str) -> Path:
    return FOLDER / name / "bin" / "python"


def last_line(error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    text = error.stderr if isinstance(error.stderr, str) else (error.stderr or b"").decode()
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else str(error)


def run(*command: str, seconds: int = 1200) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds, cwd=ROOT)


def set_up(name: str) -> str | None:
    """Makes the environment, unless it stands. Returns why it could not, if so."""
    folder, peer = FOLDER / name, PEERS[name]
    if (folder / "ready").exists() and (folder / "ready").read_text() == repr(peer):
        return None
    shutil.rmtree(folder, ignore_errors=True)
    pip = (str(python(name)), "-m", "pip", "install", "--quiet", "--only-binary=:all:")
    try:
        run(sys.executable, "-m", "venv", str(folder))
        run(*pip, "--no-deps", peer.wheel, *peer.alone)
        if peer.needs:
            run(*pip, *peer.needs)
        run(
            str(python(name)),
            "-m",
            f"benchmarks.peers.measure_{name}",
            "--sizes",
            "1024",
            "--repetitions",
            "1",
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "reason").write_text(last_line(error) + "\n")
        return last_line(error)
    (folder / "ready").write_text(repr(peer))
    return None


def measure(name: str, sizes: Sequence[int], repetitions: int) -> dict[str, Any]:
    """What the peer's script measured; or {"reason": why there is nothing}."""
    folder = FOLDER / name
    if not (folder / "ready").exists():
        reason = folder / "reason"
        return {"reason": reason.read_text().strip() if reason.exists() else "not set up (make bench-peers)"}
    script = [str(python(name)), "-m", f"benchmarks.peers.measure_{name}"]
    script += ["--sizes", ",".join(map(str, sizes)), "--repetitions", str(repetitions)]
    try:
        done = subprocess.run(script, check=True, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return {"reason": last_line(error)}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    for name in parser.parse_args().names:
        reason = set_up(name)
        print(f"{name}: {'ready' if reason is None else reason}", flush=True)


if __name__ == "__main__":
    main()
