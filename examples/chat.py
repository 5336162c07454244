"""A chat with any hybrid transformers model, where each turn computes only what is new.

The ends of the chat template's messages are passed as breakpoints: wherever the next prompt leaves this one
(a template that drops thinking, an edited message), there is a state to go on from. Each turn says what it
reused. Needs the extra `hf`.

    python examples/chat.py Qwen/Qwen3-Next-80B-A3B-Instruct --device cuda --memory 16
    printf 'hello\\nand again\\n' | python examples/chat.py --tiny    # random weights: no download
"""

from __future__ import annotations

import argparse
import string
import sys
from contextlib import suppress

import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from hybridcache.hf import CachedModel, Result

CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content.split('</think>')[-1] if message.role == 'assistant' else message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


class Chat:
    """The messages so far, and the engine that reads them."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, memory_bytes: int, system: str = ""
    ) -> None:
        self.engine = CachedModel(model, memory_bytes=memory_bytes, prefill_chunk=2048)
        self.tokenizer = tokenizer
        self.messages = [{"role": "system", "content": system}] if system else []
        stops = model.generation_config.eos_token_id
        self.stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}

    def turn(self, text: str, **options: object) -> tuple[str, Result]:
        """Says `text`; the answer, and how it came about."""
        self.messages.append({"role": "user", "content": text})
        prompt = self.render(self.messages, add_generation_prompt=True)
        result = self.engine.generate(
            prompt, breakpoints=self.message_ends(prompt), eos_token_id=self.stops, **options
        )
        answer = self.tokenizer.decode(result.sequence[len(prompt) :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer, result

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )

    def message_ends(self, prompt: list[int]) -> list[int]:
        """Positions in the prompt at which a message ends."""
        ends = []
        for count in range(1, len(self.messages) + 1):
            with suppress(TemplateError):  # some templates refuse a conversation without a user
                start = self.render(self.messages[:count])
                if start == prompt[: len(start)]:
                    ends.append(len(start))
        return ends


def report(number: int, result: Result) -> str:
    """What a turn cost: `reason` says why no more was reused."""
    prompt = result.reused + result.computed
    seconds = result.seconds_to_first_token or 0.0
    return (
        f"[turn {number}: {prompt} tokens, {result.reused} reused, {result.computed} computed "
        f"({result.match.reason}), first token after {seconds:.3f} s]"
    )


def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random Qwen3.5 of four layers whose states remember, and a tokenizer of ASCII characters."""
    special = ["<|im_end|>", "<|im_start|>"]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(string.printable[:96] + "\n")
    symbols = [*special, *sorted({letter for piece, _ in letters for letter in piece})]
    characters = Tokenizer(
        models.BPE({each: number for number, each in enumerate(symbols)}, [], unk_token="?")
    )
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=special[0], additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = CHATML
    config = Qwen3_5TextConfig(
        vocab_size=len(symbols),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        initializer_range=0.15,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(1e-3, 2e-2).log_()
    return model.eval(), tokenizer


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a name on the hub, or a folder")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead")
    parser.add_argument("--memory", type=float, default=1.0, metavar="GB", help="for the cache (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--system", default="You are a helpful assistant.", help="the system prompt")
    parser.add_argument("--max-new-tokens", type=int, default=None, metavar="N", help="(512; tiny: 24)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy (0)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if bool(args.model) == args.tiny:
        parser().error("a model or --tiny, not both")
    if args.tiny:
        torch.set_num_threads(1)  # as fast as small models run
        model, tokenizer = tiny()
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device).eval()
    options = {"max_new_tokens": args.max_new_tokens or (24 if args.tiny else 512)}
    if args.temperature > 0:
        options |= {"do_sample": True, "temperature": args.temperature}
    chat = Chat(model, tokenizer, int(args.memory * 1e9), args.system)
    number = 0
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            text = input("> " if sys.stdin.isatty() else "")
            number += 1
            answer, result = chat.turn(text, **options)
            print(answer, report(number, result), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
