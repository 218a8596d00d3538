"""The rows of IRG's tables: what a row is called, and the arms and stages that it shows."""

from controls import ANOTHER, BEST_OF_TWO, WHERE_FLAGGED, WHERE_WRONG

I1, I2, STOPPED, CHOSEN = "trained_turn1", "trained_turn2", "trained_stopped", "trained_chosen"
TRAINED = {"trajectories": "trajectories", "long": "trajectories, none twice", "six": "six modes"}
ONCE = TRAINED["long"]
KEPT = "I1 kept where R2 finds nothing wrong, else"
UNLESS_WRONG = "I1 kept where the oracle finds nothing wrong, else another I1 (control)"
OF_TRAINED = (
    ("I1", I1),
    ("I2", I2),
    (f"{KEPT} I2", STOPPED),
    (f"{KEPT} another I1 (control)", WHERE_FLAGGED),
    ("of I1 and I2 the one that a recogniser prefers", CHOSEN),
    ("of two I1 the one that a recogniser prefers (control)", BEST_OF_TWO),
)
LADDER = (  # name, arm, stage
    ("base, direct", "good", "base_direct"),
    ("base, with a plan", "good", "base_plan"),
    ("good pictures only: I1", "good", I1),
    *((f"{name}: {what}", arm, stage) for arm, name in TRAINED.items() for what, stage in OF_TRAINED),
    ("six modes, reflections told by the world: I2", "told_world", I2),
    (f"six modes, reflections told by the world: {KEPT} I2", "told_world", STOPPED),
    (f"six modes: {UNLESS_WRONG}", "told_world", WHERE_WRONG),
    ("six modes, told of another prompt's picture (control): I2", "told_another", I2),
    ("six modes, told that nothing is wrong (control): I2", "told_stop", I2),
    ("six modes, plans told by the world: I1", "told_plan", I1),
    ("six modes, plans told by the world: I2", "told_plan", I2),
    (f"{ONCE}, reflections told by the world: I2", "long_told_world", I2),
    (f"{ONCE}, reflections told by the world: {KEPT} I2", "long_told_world", STOPPED),
    (f"{ONCE}: {UNLESS_WRONG}", "long_told_world", WHERE_WRONG),
    (f"{ONCE}, told of another prompt's picture (control): I2", "long_told_another", I2),
    ("six modes, texts at temperature 1, as GRPO has them: I1", "grpo", "base_turn1"),
    ("the same: I2", "grpo", "base_turn2"),
    ("+ GRPO on I2: I1", "grpo", I1),
    ("+ GRPO on I2: I2", "grpo", I2),
    ("+ GRPO, random reward (control): I2", "grpo_random", I2),
)
WITHIN = (  # before and after; the base is that of the arm `good`
    ("I1 - base with a plan", "base_plan", I1),
    ("I1 - base direct", "base_direct", I1),
    ("I2 - base with a plan", "base_plan", I2),
    ("I2 - I1", I1, I2),
    ("kept or I2 - I1", I1, STOPPED),
    ("kept or another I1 - I1 (control)", I1, WHERE_FLAGGED),
    ("kept or I2 - kept or another I1", WHERE_FLAGGED, STOPPED),
    ("chosen of I1 and I2 - I1", I1, CHOSEN),
    ("chosen of two I1 - I1 (control)", I1, BEST_OF_TWO),
    ("chosen of I1 and I2 - chosen of two I1", BEST_OF_TWO, CHOSEN),
)
AGAINST_ANOTHER = "kept or I2 - another I1 where the oracle finds fault"
PAIRS = (  # name, then arm and stage before and after
    ("good pictures: I1 - base with a plan", ("good", "base_plan"), ("good", I1)),
    ("good pictures: I1 - base direct", ("good", "base_direct"), ("good", I1)),
    *(
        (f"{name}: {what}", ("good" if before.startswith("base") else arm, before), (arm, after))
        for arm, name in TRAINED.items()
        for what, before, after in WITHIN
    ),
    ("six modes' I1 - good pictures' (equal steps, fewer first pictures)", ("good", I1), ("six", I1)),
    ("six modes - trajectories, I1", ("trajectories", I1), ("six", I1)),
    ("six modes - trajectories, I2", ("trajectories", I2), ("six", I2)),
    ("trajectories: none twice - most twice, I1", ("trajectories", I1), ("long", I1)),
    ("trajectories: none twice - most twice, I2", ("trajectories", I2), ("long", I2)),
    ("six modes, told by the world: I2 - I1", ("told_world", I1), ("told_world", I2)),
    ("six modes, told by the world: kept or I2 - I1", ("told_world", I1), ("told_world", STOPPED)),
    (
        "six modes: another I1 where the oracle finds fault - I1 (control)",
        ("told_world", I1),
        ("told_world", WHERE_WRONG),
    ),
    (f"six modes, told by the world: {AGAINST_ANOTHER}", ("told_world", WHERE_WRONG), ("told_world", STOPPED)),
    (f"{ONCE}, told by the world: I2 - I1", ("long_told_world", I1), ("long_told_world", I2)),
    (f"{ONCE}, told by the world: kept or I2 - I1", ("long_told_world", I1), ("long_told_world", STOPPED)),
    (f"{ONCE}, told by the world: {AGAINST_ANOTHER}", ("long_told_world", WHERE_WRONG), ("long_told_world", STOPPED)),
    ("six modes, told of another prompt's picture: I2 - I1", ("told_another", I1), ("told_another", I2)),
    ("six modes, told that nothing is wrong: I2 - I1", ("told_stop", I1), ("told_stop", I2)),
    ("six modes: I1 of the world's plans - I1 of its own", ("six", I1), ("told_plan", I1)),
    ("six modes, told by the world: I2 - I1 of the world's plans", ("told_plan", I1), ("told_world", I2)),
    ("GRPO's I2 - the same before it", ("grpo", "base_turn2"), ("grpo", I2)),
    ("GRPO's I1 - the same before it", ("grpo", "base_turn1"), ("grpo", I1)),
    ("GRPO's I2 - its random control's I2", ("grpo_random", I2), ("grpo", I2)),
)
REFLECTIONS = (  # name, arm, and the stages before and after
    *((name, arm, I1, I2) for arm, name in TRAINED.items()),
    *((f"{name}, another I1 in place of I2 (control)", arm, I1, ANOTHER) for arm, name in TRAINED.items()),
    ("six modes, told by the world", "told_world", I1, I2),
    (f"{ONCE}, told by the world", "long_told_world", I1, I2),
    ("six modes, told of another prompt's picture (control)", "told_another", I1, I2),
    ("six modes, told that nothing is wrong (control)", "told_stop", I1, I2),
    ("six modes, plans told by the world", "told_plan", I1, I2),
    ("six modes, third round", "rounds", I2, "trained_turn3"),
    ("six modes, fourth round", "rounds", "trained_turn3", "trained_turn4"),
    ("+ GRPO", "grpo", I1, I2),
)
ROUNDS = {f"round {turn}": f"trained_turn{turn}" for turn in (1, 2, 3, 4)}
ROUNDS |= {"the first picture that R finds nothing wrong with, else the last": STOPPED}
