"""Memory set aside for weights that are kept dequantized: how much there is, and who has some of it."""

from __future__ import annotations


class Room:
    """A number of bytes that layers share: first come, first served.

    Attributes:
        size: Bytes in all.
        left: Bytes that nobody has.
    """

    def __init__(self, size: int) -> None:
        self.size = self.left = size

    def take(self, size: int) -> bool:
        """Take that many bytes, or none and return False if they are not there."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def give_back(self, size: int) -> None:
        """Give bytes back that were taken."""
        self.left += size
        assert self.left <= self.size
