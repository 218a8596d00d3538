"""Says so when there is nothing to learn from: equal rewards, a judge that never differs, a gradient of zero."""

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from t2i_rl.core.numbers import Count

READ = ("reward/", "watch/", "train/grad_norm")  # and no clock: what is kept here goes into checkpoints
FEWEST_STEPS = 3  # a shorter run is a trial, and equal rewards in it are chance


class NoSpread(L.Callback):
    """Reads what is logged and says once, after `after_steps` steps in a row (or at the end of a shorter run), what
    never varied.

    Args:
        after_steps: batches, each a rollout where a method draws.
    """

    def __init__(self, after_steps: Count = 5):
        self.after_steps, self.steps = after_steps, 0
        self.streaks: dict[str, int] = {}
        self.before: dict[str, float] = {}
        self.warnings: dict[str, str] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(READ)}
        self.steps += 1
        silent = self._silent(logged)
        self.streaks = {name: self.streaks.get(name, 0) + 1 for name in silent}
        self.before = logged
        self._say(silent, self.after_steps)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.steps >= FEWEST_STEPS:
            self._say(self._silent(self.before), self.steps)

    def _silent(self, logged: dict[str, float]) -> dict[str, str]:
        """What says nothing in this step, by the name of its column, and what to do about it."""
        silent = {}
        if logged.get("reward/zero_std_ratio") == 1:
            silent["reward/zero_std_ratio"] = (
                "the rewards of every group were equal (reward/zero_std_ratio is 1), so there was nothing to learn "
                "from: see that "
                "the reward can tell these pictures apart"
            )
        for name, value in logged.items():
            if name.startswith("reward/") and name.endswith("_group_std") and value == 0 and not silent:
                part = name.removeprefix("reward/").removesuffix("_group_std")
                silent[name] = (
                    f"the reward's part {part} was equal within every group ({name} is 0): it teaches nothing"
                )
            if name.startswith("watch/") and self.before.get(name, value) == value:
                silent[name] = f"{name} was {value:g} every time: see that this judge can read these pictures"
        if logged.get("train/grad_norm") == 0 and "reward/zero_std_ratio" not in silent:
            silent["train/grad_norm"] = "the gradient was 0 (train/grad_norm), so nothing was learnt"
        return silent

    def _say(self, silent: dict[str, str], after: int) -> None:
        for name, what in silent.items():
            if self.streaks.get(name, 0) >= after and name not in self.warnings:
                self.warnings[name] = f"in {self.streaks[name]} steps in a row {what} (docs/metrics.md)"
                rank_zero_only(print)(self.warnings[name], flush=True)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "streaks": self.streaks, "before": self.before, "warnings": self.warnings}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.streaks, self.before, self.warnings = (
            state[name] for name in ("steps", "streaks", "before", "warnings")
        )
