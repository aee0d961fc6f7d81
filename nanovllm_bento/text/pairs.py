"""Token ids of a context and its continuation, which a tokenizer may join at their border.

The rule is that of EleutherAI's lm-evaluation-harness, so that scores can be compared: both are encoded as one text,
and what goes beyond the context's own tokens is the continuation. Spaces between them belong to the continuation.
"""


def move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """The pair with the context's spaces at its end moved to the continuation, where most tokenizers want them."""
    stripped = context.rstrip()
    return (stripped, context[len(stripped) :] + continuation) if stripped else (context, continuation)


def continuation_ids(whole: list[int], context: list[int]) -> list[int]:
    """The continuation's token ids, from those of both as one text and those of the context; empty if they melted."""
    return whole[len(context) :]
