"""Doing something before or after a method of one object, or in its place, where Lightning has no hook; and undoing it.

Only the instance is touched, never a class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

Undo = Callable[[], None]


def wrap(
    owner: object, method: str, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> Undo:
    """Let ``before`` and ``after`` be called around ``owner.method``, with its arguments; returns what undoes it."""
    return substitute(owner, method, _Wrapped(_around, getattr(owner, method), before, after))


def substitute(owner: object, method: str, function: Callable[..., Any]) -> Undo:
    """Let ``function`` be called in place of ``owner.method``; returns what undoes it."""
    original = vars(owner).get(method)
    setattr(owner, method, function)
    return partial(_restore, owner, method, original)


def substitute_forward(module: nn.Module, function: partial[Any]) -> Undo:
    """Let a module compute by ``function``, whose first argument is its own ``forward``; returns what undoes it."""
    return substitute(module, "forward", _Wrapped(function.func, *function.args))


class _Wrapped(partial[Any]):
    """A wrapped method, in a form that Lightning's ``is_overridden`` sees through.

    Only the one object is wrapped: a copy of it, or what is unpickled, has the method as it was.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.args[0],)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


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


def _restore(owner: object, method: str, original: Any) -> None:
    if original is None:
        delattr(owner, method)
    else:
        setattr(owner, method, original)
