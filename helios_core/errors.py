"""Errors of our own: each names the thing, the value and what is allowed.

HeliosError                what we raise on purpose; never retried by the service, but for Spoilt
├── InvalidInput           a request that cannot be served: the caller's to mend
├── CheckpointError        a model folder or hub id that cannot be loaded
├── MediaError             frames that cannot be encoded
├── Spoilt                 a call that gave nothing sound; once more may go well
│   ├── NotFinite          what the model made has values that are not numbers
│   └── OutOfMemory        the memory was too short for it
└── Cancelled              the work was stopped because nobody wants it any more

All arguments go to the base constructor, so that an error survives pickling between processes.
"""

from __future__ import annotations


class HeliosError(Exception):
    """Base of all errors raised on purpose. `code` is the stable name that travels in HTTP answers.

    `public`: what a client hears in place of a message that names what is inside; None: the message can be told.
    """

    code = "helios_error"
    public: str | None = None

    @property
    def told(self) -> str:
        """What a client hears."""
        return str(self) if self.public is None else self.public


class InvalidInput(HeliosError):
    """A request that cannot be served.

    `field`: the request's field; `value`: what was given; `allowed`: the allowed range, in words.
    """

    code = "invalid_input"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.field, self.value, self.allowed = field, value, allowed

    def __str__(self) -> str:
        return f"{self.field} is {shown(self.value)}; allowed: {self.allowed}"


def shown(value: object) -> str:
    """A value as messages show it: 80 characters of its repr at most."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class CheckpointError(HeliosError):
    """A model that cannot be loaded. The message names the file and, where there is one, the key and both shapes."""

    code = "checkpoint_error"


class MediaError(HeliosError):
    """Frames that cannot be encoded. The message names the fragment and what was wrong."""

    code = "media_error"


class Spoilt(HeliosError):
    """Work whose result is none, although its inputs were good. The message says what was being made."""


class NotFinite(Spoilt):
    """The model made values that are not numbers, or infinite: bad weights, bad memory, or an input that no training
    had."""

    code = "not_finite"
    public = "the model made values that are not numbers"


class OutOfMemory(Spoilt):
    """The memory was too short."""

    code = "out_of_memory"
    public = "the memory was too short to make this video"


class Cancelled(HeliosError):
    """The work was stopped on request; what was committed before stays valid."""

    code = "cancelled"
