"""What every source of training data is."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from t2i_rl.core.contract_checks import check_prompts
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, check_value
from t2i_rl.core.prompts import Prompt


class Data(L.LightningDataModule):
    """A data module. A subclass gives `prompts`, `batch_size` and `train_dataloader`.

    gives: what a batch holds, which a method says that it `learns_from`: `prompts` (of `(number,
        Prompt)`), `pairs`, `preferences` or `trajectories`.
    prompts: the texts of the training data, known before any weight loads.
    validation: prompts held back from training, for callbacks that draw while it goes on.
    batch_size: rows a step, over all ranks together.
    """

    gives: str = "prompts"
    prompts: Sequence[Prompt] = ()
    validation: Sequence[Prompt] = ()
    batch_size: int = 1

    def train_dataloader(self) -> DataLoader:
        """Batches without end, from where the method's counter stands."""
        raise NotImplementedError(f"{type(self).__name__} must have train_dataloader()")

    def texts(self) -> Sequence[str]:
        """What a model's text encoders will be given of it beside `prompts`."""
        return ()

    def check(self, image_size: int) -> None:
        """Refuse what cannot be learnt by a model that draws images of this side in pixels.

        Raises:
            UserError: one line that says what to change.
        """


def check_data(data: Any, where: str = "data") -> None:
    """Whether a data module keeps its contract.

    Raises:
        UserError: one line that names its class and what it must give.
    """
    name = f"{where} ({type(data).__name__})"
    if not isinstance(data, Data):
        raise UserError(f"{name} must derive from t2i_rl.Data, whose defaults say what it need not")
    if type(data).train_dataloader is Data.train_dataloader:
        raise UserError(f"{name} must have train_dataloader()")
    check_value(data.batch_size, Count, f"{name}.batch_size")
    if data.prompts or data.gives != "trajectories":  # those that lie on a disk bring their own
        check_prompts(data.prompts, f"{name}.prompts")
