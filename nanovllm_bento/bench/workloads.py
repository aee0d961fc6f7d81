"""Workloads: which prompts a benchmark sends and how many tokens it asks for. Nothing here touches an engine."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

MAX_TOKEN_ID = 10_000
"""Prompt tokens are drawn from 0 to this, both included."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts as token ids, and exactly how many tokens each one is to yield (end of sequence is ignored)."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]
    temperature: float

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence, prompt and output together."""
        return max(len(p) + n for p, n in zip(self.prompts, self.output_lens, strict=True))

    def describe(self) -> dict[str, object]:
        """The workload in a result file."""
        return {
            "name": self.name,
            "num_seqs": len(self.prompts),
            "input_tokens": self.num_input_tokens,
            "output_tokens": self.num_output_tokens,
            "temperature": self.temperature,
        }


def seed_workload(num_seqs: int = 256, *, max_in: int = 1024, max_out: int = 1024) -> Iterator[Workload]:
    """The seed workload of nano-vllm's benchmark; yields one per repeat, without end.

    CPython's generator seeded with 0: for each sequence a prompt length in [100, max_in] and then its tokens; after all
    prompts, each sequence's output length in [100, max_out]. Temperature 0.6. Later repeats go on drawing from the same
    generator: fresh prompts of the same lengths, the same output lengths (so nothing is in a prefix cache). num_seqs is
    part of the workload, as it moves the draws: 256 sequences are 142,827 tokens in and 133,966 out.
    """
    random = Random(0)
    lengths: list[int] = []
    prompts: list[list[int]] = []
    for _ in range(num_seqs):
        lengths.append(random.randint(100, max_in))
        prompts.append(_draw(random, lengths[-1]))
    output_lens = [random.randint(100, max_out) for _ in range(num_seqs)]
    while True:
        yield Workload("seed", prompts, output_lens, temperature=0.6)
        prompts = [_draw(random, n) for n in lengths]


def fixed_workload(
    num_seqs: int, input_len: int, output_len: int, *, temperature: float = 0.0, seed: int = 0
) -> Iterator[Workload]:
    """num_seqs prompts of input_len tokens, output_len tokens out each; greedy. Yields fresh prompts per repeat."""
    random = Random(seed)
    name = f"fixed {input_len} in, {output_len} out"
    while True:
        prompts = [_draw(random, input_len) for _ in range(num_seqs)]
        yield Workload(name, prompts, [output_len] * num_seqs, temperature)


def shared_prefix_len(a: list[int], b: list[int]) -> int:
    """How many leading tokens two sequences have in common."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


def _draw(random: Random, length: int) -> list[int]:
    return [random.randint(0, MAX_TOKEN_ID) for _ in range(length)]
