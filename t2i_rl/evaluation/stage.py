"""A stage of a run: whose pictures these are and how they were drawn; its name is what stands on the disk."""

from dataclasses import dataclass

SIDES = ("base", "trained")
WAYS = ("direct", "plan", "turns")
STAGES = tuple(f"{side}_{way}" for side in SIDES for way in WAYS)  # those that a run can be asked for


@dataclass(frozen=True)
class Stage:
    """One set of pictures, a record each.

    side: `base`, the model before training, or `trained`; empty for the ends of a search over noise.
    way: how a prompt was drawn: `direct`, with a `plan`, or in `turns`.
    picture: which picture of such a drawing, where it gives several: `turn1`, `turn2`, ..., `stopped`, `chosen`; of a
        search `initial`, `best`, `last`.
    """

    side: str
    way: str
    picture: str = ""

    @classmethod
    def parse(cls, name: str) -> "Stage":
        """The stage of this name, as `name` gives it."""
        side, _, rest = name.partition("_")
        if side not in SIDES:
            return cls("", "direct", name)
        return cls(side, rest) if rest in WAYS else cls(side, "turns", rest)

    @property
    def name(self) -> str:
        """What its folder and results.json call it."""
        return "_".join(part for part in (self.side, self.picture or self.way) if part)

    @property
    def turn(self) -> int | None:
        """The number of a turn, from 1; None where the stage is no single turn's."""
        number = self.picture.removeprefix("turn")
        return int(number) if self.picture.startswith("turn") and number.isdecimal() else None

    def of(self, picture: str) -> "Stage":
        """The stage of one picture of this drawing."""
        return Stage(self.side, self.way, picture)
