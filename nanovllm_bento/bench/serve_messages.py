"""What the load generator's parent and its client processes tell each other, as msgpack. No import but msgspec."""

import msgspec


class Turn(msgspec.Struct):
    """What the user says, and how long the answer may get."""

    text: str
    max_tokens: int


class Conversation(msgspec.Struct):
    """A client says the turns one after another, each behind all that was said before."""

    system: str | None
    turns: list[Turn]


class Plan(msgspec.Struct):
    """What one client process is to do.

    ``schedule``: (seconds after the start, item) of this process's requests; None: take the next item whenever one of
    ``concurrency`` slots is free, from the tickets that all processes share. ``fields``: fields of every body that the
    client makes itself, in conversations. The spool and the tickets are files that the process inherits.
    """

    host: str
    port: int
    tls: bool
    path: str
    head: bytes  # request line and headers up to the length of the body
    chat: bool
    stream: bool
    conversations: bool
    fields: dict[str, object]
    think_time: float
    timeout: float
    concurrency: int | None
    schedule: list[tuple[float, int]] | None
    spool_fd: int
    tickets_fd: int
    num_items: int


class Record(msgspec.Struct, array_like=True):
    """One request. Times are of the monotonic clock, which all processes of a machine share; None: it did not happen.

    ``last``: the last chunk; ``ended``: when the client was done with it, whole or not.
    ``chunks``: when each chunk with tokens came, in seconds after ``started``, as little-endian float64 bytes.
    ``failure``: its kind, None for a whole answer; ``detail``: in words.
    """

    item: int
    turn: int
    wanted_tokens: int | None
    planned: float | None
    started: float
    first: float | None = None
    last: float | None = None
    ended: float = 0.0
    chunks: bytes = b""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    status: int | None = None
    failure: str | None = None
    detail: str = ""


class Progress(msgspec.Struct, tag=True):
    """What a process did since it started."""

    started: int
    completed: int
    failed: int
    chunks: int
    ttft: list[float]  # of the requests since the last one, seconds


class Usage(msgspec.Struct):
    """What the process itself cost, from the start to its last answer. A share is of one core.

    ``waited_seconds``: runnable but without a core; None where the kernel does not tell.
    """

    seconds: float
    cpu_seconds: float
    peak_cpu_share: float
    waited_seconds: float | None


class Done(msgspec.Struct, tag=True):
    """The last word of a process. ``not_sent``: turns of conversations that ended early."""

    records: list[Record]
    usage: Usage
    not_sent: int
    reconnects: int


class Ready(msgspec.Struct, tag=True):
    """Everything is in place; the process waits for the start."""


FromClient = Ready | Progress | Done
encode = msgspec.msgpack.Encoder().encode
decode_plan = msgspec.msgpack.Decoder(Plan).decode
decode_message = msgspec.msgpack.Decoder(FromClient).decode
