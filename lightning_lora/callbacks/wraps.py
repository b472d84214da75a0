"""Doing something before or after a method of one object, where Lightning has no hook, and undoing it.

Only the instance is touched, never a class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def wrap(
    owner: object, method: str, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> Callable[[], None]:
    """Let ``before`` and ``after`` be called around ``owner.method``, with its arguments; returns what undoes it."""
    original = vars(owner).get(method)
    setattr(owner, method, partial(_around, getattr(owner, method), before, after))
    return partial(_unwrap, owner, method, original)


def _around(
    inner: Callable[..., Any],
    before: Callable[..., None] | None,
    after: Callable[..., None] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if before is not None:
        before(*args, **kwargs)
    result = inner(*args, **kwargs)
    if after is not None:
        after(*args, **kwargs)
    return result


def _unwrap(owner: object, method: str, original: Any) -> None:
    if original is None:
        delattr(owner, method)
    else:
        setattr(owner, method, original)
