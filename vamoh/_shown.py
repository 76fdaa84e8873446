"""How values and lists read in messages: short, whatever they hold; without torch, which the configuration does not
need.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import PurePath

LENGTH = 80
"""Most characters of a value in a message."""


class _Short(reprlib.Repr):
    """Looks at the first entries of what it shows: the text of nested repetitions can be too large for any memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 16
        self.maxstring = self.maxother = self.maxlong = LENGTH

    def repr_int(self, x: int, level: int) -> str:  # pydoc names them so; reprlib finds them by it
        return repr(x) if abs(x) < 1 << 256 else f"an int of {x.bit_length()} bits"

    def repr_instance(self, x: object, level: int) -> str:
        plain = x is None or isinstance(x, bool | int | float | complex | str | PurePath)
        if isinstance(x, bytes | bytearray):
            return repr(bytes(x[:LENGTH]))
        return repr(x) if plain else type(x).__name__


_short = _Short()


def shown(value: object) -> str:
    """A value for a message, in at most 80 characters; of what is no plain value its type."""
    text = _short.repr(value)
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 3]}..."


def unquoted(value: object) -> str:
    """A name or a word for a message, without the quotes that `shown` gives a text."""
    return value if isinstance(value, str) and len(value) <= LENGTH and value.isprintable() else shown(value)


def listed(lines: Sequence[str], length: int = 200) -> str:
    """Lines in one, parted by semicolons: as many as fit, at least one, and how many more there are."""
    text, count = lines[0][:length], 1
    for line in lines[1:]:
        if len(text) + len(line) > length:
            break
        text, count = f"{text}; {line}", count + 1
    return text if count == len(lines) else f"{text}; and {len(lines) - count} more"


def reason(error: BaseException, length: int = 140) -> str:
    """What an error says, in one line; its type where it says nothing."""
    text = " ".join(str(error).split())
    return (text if len(text) <= length else f"{text[: length - 3]}...") or type(error).__name__
