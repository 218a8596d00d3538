"""Lightning's rich progress bar in steps: data streams have no end, so there are no epochs to count."""

from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """`training` where Lightning writes `Epoch 0/-2`."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
