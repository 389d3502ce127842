"""A place that says what is worn: of a context, or of all that have none of their own."""

from __future__ import annotations

from contextvars import Token

from ia3rt.routing.worn import Worn


class Wearing:
    """What is worn by the forwards that begin from now on.

    Attributes:
        worn: what that is; a switch puts another one there.
        holds: whether it is the content of a `with`, which says itself when it ends.
        generates: whether that is a call of `generate`.
        seen: how many tokens of each row that has seen, where its tokens wear mixes of their own.
        token: what takes it back that the context wears something of its own.
        task: the backward pass that the `with` was entered in, which computes a forward again; -1 where in none.
        is_repeated: whether a backward pass enters the `with` again, as it is inside of what that computes again.
    """

    def __init__(self, worn: Worn) -> None:
        self.worn = worn
        self.holds = self.generates = False
        self.seen: int | None = None
        self.token: Token[Wearing] | None = None
        self.task = -1
        self.is_repeated = False
