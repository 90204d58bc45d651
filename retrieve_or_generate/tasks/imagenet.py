"""ImageNet-1K's class names as CLIP published them, told apart where two classes share one, and its WordNet ids.

In that list "missile" and "sunglasses" stand twice. A set that is made by name then holds 998 classes, and two of the model's
outputs never see an image; here the second of each pair is called what WordNet calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

CLASSES = 1000
RENAMED = {744: ("missile", "projectile"), 836: ("sunglasses", "sunglass")}  # n04008634 and n04355933
"""By class id: the name that CLIP's list gives it, which another class has too, and the one that it has here."""


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """`names` as they are; where they are the published list of 1000 with its repeats, without these."""
    if len(names) != CLASSES or any(names[label] != given for label, (given, _) in RENAMED.items()):
        return tuple(names)
    return tuple(RENAMED[label][1] if label in RENAMED else name for label, name in enumerate(names))


def imagenet_names() -> tuple[str, ...]:
    """CLIP's names of the 1000 classes, each of them once."""
    from open_clip import IMAGENET_CLASSNAMES

    return distinct_names(IMAGENET_CLASSNAMES)


def imagenet_wnids() -> tuple[str, ...]:
    """The classes' synsets, in the order of their ids, which is that of the folders' names."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())
