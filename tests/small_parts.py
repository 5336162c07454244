"""To import this makes the edges of every cache stand in parts of 8 tokens, not of 512: the short prompts of
the tests would never see a second part."""

from hybridcache import _core


class SmallParts(_core.Options):
    def __init__(self) -> None:
        super().__init__()
        self.small_part = 8


vars(_core)["Options"] = SmallParts
