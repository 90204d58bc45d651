"""What is known of an image that is to go."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Found:
    """One place of the image: its hashes (md5 "" where its bytes are gone already) and the URL it came from there."""

    sha256: str
    md5: str = ""
    url: str = ""

    @classmethod
    def of(cls, data: bytes, url: str = "") -> Found:
        return cls(hashlib.sha256(data).hexdigest(), md5_of(data), url)

    @property
    def entries(self) -> list[str]:
        """For the blocklist."""
        return [self.sha256, *([self.md5] if self.md5 else []), *([self.url] if _is_address(self.url) else [])]


def md5_of(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _is_address(url: str) -> bool:
    return url.lower().startswith(("http://", "https://")) and len(url.split()) == 1
