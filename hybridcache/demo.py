"""The demo: one agent conversation on CPU, turn by turn, cold and cached, with proof that both read alike.

Owns the profile of the conversation, its text (`Corpus`), its tiny model, and the three sides that run each
turn: the cached one, the cold one, and the live reference that the cached one must equal bit for bit. How a
run is shown is `demo_report`'s matter. Touches the cache only through `hf.CachedModel`. Downloads nothing:
the weights are random, the text is this repository's own.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import DynamicCache, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from .config import ModelLayout
from .hf import CachedModel, StepRecord

T = TypeVar("T")
PAGE_SIZE = 64
VOCABULARY = 256  # a token is a byte of UTF-8
DTYPES = ("float32", "bfloat16")
OPENING = b"<|system|>\nYou are a coding agent. Read the repository.\n<|user|>\nHow does this cache work?\n"
ASK = b"\n<|assistant|>\n"
TEXT_FOLDERS = ("docs", "hybridcache", "csrc", "tests", "benchmarks", "examples")
TEXT_SUFFIXES = (".md", ".py", ".pyi", ".h", ".cpp")


@dataclass(frozen=True)
class Profile:
    """What is run, in tokens (bytes of text). Raises ValueError where a field is out of range.

    Turn 1 has a prompt of `first` tokens; each later prompt is `turn_tokens` longer: the `generate` tokens
    that the model added in the turn before, then new text. `threads` holds for all sides; 1 by default,
    because a model this small on several threads measures how busy the machine is.
    """

    turns: int = 15
    first: int = 16_384
    turn_tokens: int = 256
    generate: int = 32
    chunk: int = 2_048
    threads: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        least = {"turns": 1, "first": 256, "generate": 1, "chunk": 1, "threads": 1}
        for name, smallest in (least | {"turn_tokens": self.generate + 64}).items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {smallest}")
        most = {
            "first": 1 << 20,
            "turn_tokens": 1 << 20,
            "turns": 1_000,
            "threads": 4 * (os.cpu_count() or 1),
        }
        for name, largest in most.items():
            if getattr(self, name) > largest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at most {largest}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")

    @property
    def last_prompt(self) -> int:
        """Tokens of the last turn's prompt."""
        return self.first + (self.turns - 1) * self.turn_tokens


# --- the text: what an agent that reads this repository would send ---


def repository_files(package: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the repository's texts in a fixed order; of the package's own if installed alone."""
    root = package.parent
    if (root / "pyproject.toml").is_file():
        nested = (path for name in TEXT_FOLDERS for path in sorted((root / name).rglob("*")))
        found = [*sorted(root.glob("*.md")), *nested]
    else:
        found = sorted(package.rglob("*"))
    texts = ((path, path.read_bytes()) for path in found if path.suffix in TEXT_SUFFIXES and path.is_file())
    return [(path.relative_to(root).as_posix(), content) for path, content in texts if content]


class Corpus:
    """Files cut into tool results: each reads on in the next file.

    When all are read, `rounds` goes up by one and they are read again at other offsets.
    """

    PIECE = 2_048  # bytes of one tool result at most, so that a long prompt holds many files

    def __init__(self, files: Sequence[tuple[str, bytes]]) -> None:
        self.files, self.rounds = {name: content for name, content in files if content}, 0
        if not self.files:
            raise ValueError("files: no text in them, expected at least one byte")
        self._pieces = self._read()

    def text(self, size: int) -> bytes:
        """Exactly `size` bytes of tool results with their role marks."""
        out = bytearray()
        while len(out) < size:
            name, offset, piece = next(self._pieces)
            out += f"\n<|tool|>\n{name} from byte {offset}\n".encode() + piece
        return bytes(out[:size])

    def _read(self) -> Iterator[tuple[str, int, bytes]]:
        while True:
            cursors = {name: self.rounds * 97 % len(content) for name, content in self.files.items()}
            while cursors:
                for name, offset in list(cursors.items()):
                    yield name, offset, self.files[name][offset : offset + self.PIECE]
                    cursors[name] = offset + self.PIECE
                    if cursors[name] >= len(self.files[name]):
                        del cursors[name]
            self.rounds += 1


class Conversation:
    """All that was said so far; `prompt` is what the next turn sends."""

    def __init__(self, corpus: Corpus, profile: Profile) -> None:
        self._corpus, self._turn_tokens = corpus, profile.turn_tokens
        results = corpus.text(profile.first - len(OPENING) - len(ASK))
        self.prompt: list[int] = list(OPENING + results + ASK)

    def answer(self, generated: Sequence[int]) -> None:
        """Append a turn's generated tokens, the tool result that they led to and the next role mark."""
        result = self._corpus.text(self._turn_tokens - len(generated) - len(ASK))
        self.prompt = [*self.prompt, *generated, *result, *ASK]


# --- the model ---


@contextmanager
def engine(profile: Profile) -> Iterator[None]:
    """What all sides run under: no gradients, the profile's threads, no warnings of slow kernels."""
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity(logging.ERROR)
    torch.set_num_threads(profile.threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)


def build_model(profile: Profile) -> Any:
    """A Qwen3_5ForCausalLM of 3 recurrent layers and 1 full, hidden size 64, K != V, which remembers.

    transformers' own initial decay forgets within about one token: a wrong recurrent state would change no
    logit. With slow decay and large weights it changes logits by more than 1. The seed is fixed.
    """
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        initializer_range=0.15,
        max_position_embeddings=max(32_768, profile.last_prompt + profile.generate),
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = Qwen3_5ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(1e-3, 2e-2).log_()
    return model.eval().to(getattr(torch, profile.dtype))


def arena_bytes(config: Any, profile: Profile) -> int:
    """Room for twice the conversation's KV and four states a turn: this shows reuse, nothing has to leave."""
    dtype = profile.dtype
    layout = ModelLayout.from_hf_config(config, page_size=PAGE_SIZE, kv_dtype=dtype, conv_dtype=dtype)
    pages = 2 * math.ceil((profile.last_prompt + profile.generate) / PAGE_SIZE)
    pages_per_slab = math.ceil(layout.slot_bytes / layout.page_bytes)
    slabs = math.ceil(pages / pages_per_slab) + 4 * (profile.turns + 4)
    return slabs * pages_per_slab * layout.page_bytes


class ForwardCount:
    """Counts what the model really reads, forward passes and their tokens, by a hook on its decoder."""

    def __init__(self, model: Any) -> None:
        self.forwards = self.tokens = 0
        model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: object, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forwards += 1
        self.tokens += int(kwargs["input_ids"].shape[1])

    def take(self) -> tuple[int, int]:
        """(forwards, tokens) since the last call."""
        taken, self.forwards, self.tokens = (self.forwards, self.tokens), 0, 0
        return taken


# --- the run ---


@dataclass(frozen=True)
class Row:
    """One turn. Times to the first token are in milliseconds.

    `computed` and `extra_passes` (forwards beyond those of the plain model for the same suffix) come from the
    hook, `reused` and `lease_extra_passes` from the lease.
    """

    turn: int
    prompt: int
    reused: int
    computed: int
    beyond_ideal: int
    extra_passes: int
    lease_extra_passes: int
    cold_ms: float
    cached_ms: float
    exact: bool
    cold_difference: float  # largest |difference| of a computed logit from the cold forward's
    note: str  # why it is not exact

    @property
    def speedup(self) -> float:
        return self.cold_ms / self.cached_ms

    @property
    def counts_agree(self) -> bool:
        """Whether the lease says what the hook saw."""
        return self.reused + self.computed == self.prompt and self.extra_passes == self.lease_extra_passes

    @property
    def ok(self) -> bool:
        """Exact, rightly counted, and from turn 2 on nothing read twice and no forward too many."""
        minimal = self.beyond_ideal == 0 and self.extra_passes == 0
        return self.exact and self.counts_agree and (minimal or self.turn == 1)


@dataclass(frozen=True)
class Answer:
    """What the cached side did in a turn."""

    start: int  # where the lease began
    lease_extra_passes: int
    steps: list[StepRecord]  # with all logits
    prefill_steps: int  # how many of them read the prompt
    generated: list[int]
    seconds: float  # from the prompt to its first token
    forwards: int  # of the prefill, by hook
    computed: int  # tokens of the prefill, by hook

    @property
    def prefill_logits(self) -> torch.Tensor:
        return torch.cat([logits_of(step) for step in self.steps[: self.prefill_steps]])


class LiveReference:
    """The plain model on one DynamicCache that stays alive over all turns."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache, self._position = model, DynamicCache(config=model.config), 0

    def read(self, tokens: Sequence[int], end: int) -> torch.Tensor:
        """Logits [tokens read, vocabulary] of one forward from where it stands to `end`."""
        ids = as_input(tokens[self._position : end])
        self._position = end
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        logits: torch.Tensor = out.logits[0]
        return logits

    def compare(self, tokens: Sequence[int], answer: Answer) -> tuple[bool, str]:
        """(exact, why not): do the answer's steps, run here, give its logits and greedy tokens?"""
        steps = answer.steps
        if steps[0].begin != self._position:
            self.read(tokens, len(tokens))
            return False, f"began at {steps[0].begin}, not where the live run stood: no steps to compare"
        differences, greedy = [], []
        for step in steps:
            live = self.read(tokens, step.end)
            greedy.append(int(live[-1].argmax()))
            if not torch.equal(live, logits_of(step)):
                differences.append((live - logits_of(step)).abs().amax(dim=-1))
        if differences:
            rows = torch.cat(differences)
            return False, f"{int((rows != 0).sum())} rows of logits differ, by up to {float(rows.max()):.3g}"
        same = greedy[answer.prefill_steps - 1 :] == answer.generated
        return same, "" if same else "the greedy tokens differ"


class Demo:
    """The conversation and the three sides that run it. Use it inside `engine(profile)`."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.corpus = Corpus(repository_files(Path(__file__).parent))
        self.model = build_model(profile)
        self.memory_bytes = arena_bytes(self.model.config, profile)
        self.cached = CachedModel(
            self.model, memory_bytes=self.memory_bytes, page_size=PAGE_SIZE, prefill_chunk=profile.chunk
        )
        self.rows: list[Row] = []
        self.compared = 0  # rows of logits
        self._live = LiveReference(self.model)
        self._conversation = Conversation(self.corpus, profile)
        self._known: list[int] = []  # the longest text that earlier steps have read
        self._count = ForwardCount(self.model)
        self._cold(self._conversation.prompt, 1)  # warm up

    def turn(self) -> Row:
        """Run the next turn on all sides; the conversation goes on with the cached side's tokens."""
        prompt = self._conversation.prompt
        ideal = len(prompt) - min(common_prefix(self._known, prompt), len(prompt) - 1)
        answer = self._answer(prompt)
        logits = answer.prefill_logits
        cold_logits, cold_seconds = self._cold(prompt, len(logits))
        self._known = [*prompt, *answer.generated[:-1]]
        exact, note = self._live.compare(self._known, answer)
        row = Row(
            turn=len(self.rows) + 1,
            prompt=len(prompt),
            reused=answer.start,
            computed=answer.computed,
            beyond_ideal=answer.computed - ideal,
            extra_passes=answer.forwards - math.ceil((len(prompt) - answer.start) / self.profile.chunk),
            lease_extra_passes=answer.lease_extra_passes,
            cold_ms=cold_seconds * 1e3,
            cached_ms=answer.seconds * 1e3,
            exact=exact,
            cold_difference=float((cold_logits - logits).abs().max()),
            note=note,
        )
        self.rows.append(row)
        self.compared += len(self._known) - answer.start
        self._conversation.answer(answer.generated)
        return row

    def _answer(self, prompt: list[int]) -> Answer:
        """The cached side: all from the prompt to its first token is timed, then the others follow."""
        self._count.take()
        began = time.perf_counter()
        count = self.profile.generate
        request = given(self.cached.open(prompt, max_new_tokens=count, return_logits=True))
        while not request.prefilled:
            given(request.prefill())
        generated = [int(given(request.last_logits).argmax())]
        seconds = time.perf_counter() - began
        (forwards, computed), prefill_steps = self._count.take(), len(request.steps)
        while len(generated) < count:
            given(request.decode(generated[-1]))
            generated.append(int(given(request.last_logits).argmax()))
        start, extra_passes = request.lease.start, request.lease.extra_passes
        request.close()
        return Answer(
            start, extra_passes, request.steps, prefill_steps, generated, seconds, forwards, computed
        )

    def _cold(self, prompt: list[int], rows: int) -> tuple[torch.Tensor, float]:
        """(logits of the last `rows` tokens, seconds to the first token) of the plain model: one forward."""
        began = time.perf_counter()
        out = self.model(input_ids=as_input(prompt), use_cache=False, logits_to_keep=rows)
        int(out.logits[0, -1].argmax())
        return out.logits[0], time.perf_counter() - began


def as_input(tokens: Sequence[int]) -> torch.Tensor:
    """[1, tokens] int64."""
    return torch.tensor([tokens])


def logits_of(step: StepRecord) -> torch.Tensor:
    return given(step.logits)


def given(value: T | None) -> T:
    """`value`, which is None only if there was no room: the arena holds the whole conversation."""
    if value is None:
        raise RuntimeError("no room in an arena that was sized for the whole conversation")
    return value


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))
