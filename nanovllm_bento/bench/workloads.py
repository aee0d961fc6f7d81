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
    name = "seed" if (max_in, max_out) == (1024, 1024) else f"seed, at most {max_in} in and {max_out} out"
    while True:
        yield Workload(name, prompts, output_lens, temperature=0.6)
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


@dataclass(frozen=True, slots=True)
class Conversations:
    """Conversations of several turns. A turn's prompt is the system prompt, which all conversations share, and all
    that was said before it: user turns, and the answers that the engine gave.

    user_turns: token ids [conversation][turn]; answer_lens: tokens of each answer, in the same order.
    """

    name: str
    system: list[int]
    user_turns: list[list[list[int]]]
    answer_lens: list[list[int]]
    temperature: float = 0.6

    @property
    def max_len(self) -> int:
        """Tokens of the longest conversation at its end."""
        said = (
            sum(map(len, turns)) + sum(answers)
            for turns, answers in zip(self.user_turns, self.answer_lens, strict=True)
        )
        return len(self.system) + max(said)

    def describe(self) -> dict[str, object]:
        """The set in a result file."""
        return {
            "name": self.name,
            "conversations": len(self.user_turns),
            "turns": len(self.user_turns[0]),
            "requests": sum(map(len, self.user_turns)),
            "system_tokens": len(self.system),
            "user_tokens": sum(len(turn) for turns in self.user_turns for turn in turns),
            "output_tokens": sum(map(sum, self.answer_lens)),
            "temperature": self.temperature,
        }


def multi_turn(
    num_conversations: int = 64,
    num_turns: int = 6,
    *,
    system_len: int = 200,
    user_len: tuple[int, int] = (30, 200),
    answer_len: tuple[int, int] = (60, 250),
    max_len: int | None = None,
    seed: int = 0,
) -> Conversations:
    """Chats: a short system prompt, then question and answer by turns, lengths drawn uniformly from the ranges.

    max_len: where a conversation could get longer than that, all lengths shrink alike.
    """
    longest = system_len + num_turns * (user_len[1] + answer_len[1])
    system_len = _shrink(max_len, longest, system_len)
    user_len = _shrink(max_len, longest, user_len[0]), _shrink(max_len, longest, user_len[1])
    answer_len = _shrink(max_len, longest, answer_len[0]), _shrink(max_len, longest, answer_len[1])
    random = Random(seed)
    system = _draw(random, system_len)
    turns = [[_draw(random, random.randint(*user_len)) for _ in range(num_turns)] for _ in range(num_conversations)]
    answers = [[random.randint(*answer_len) for _ in range(num_turns)] for _ in range(num_conversations)]
    return Conversations("multi-turn", system, turns, answers)


def shared_system_prompt(
    num_requests: int = 256,
    *,
    system_len: int = 1000,
    own_len: tuple[int, int] = (50, 300),
    output_len: int = 32,
    max_len: int | None = None,
    seed: int = 0,
) -> Conversations:
    """Requests of one turn, all at once, behind one long system prompt. max_len: as for ``multi_turn``."""
    longest = system_len + own_len[1] + output_len
    system_len, output_len = _shrink(max_len, longest, system_len), _shrink(max_len, longest, output_len)
    own_len = _shrink(max_len, longest, own_len[0]), _shrink(max_len, longest, own_len[1])
    random = Random(seed)
    system = _draw(random, system_len)
    turns = [[_draw(random, random.randint(*own_len))] for _ in range(num_requests)]
    return Conversations("shared system prompt", system, turns, [[output_len] for _ in turns])


def shared_prefix_len(a: list[int], b: list[int]) -> int:
    """How many leading tokens two sequences have in common."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


def _shrink(max_len: int | None, longest: int, length: int) -> int:
    """length, or its share of max_len if ``longest`` is above that; at least 1."""
    return length if max_len is None or longest <= max_len else max(1, length * max_len // longest)


def _draw(random: Random, length: int) -> list[int]:
    return [random.randint(0, MAX_TOKEN_ID) for _ in range(length)]
