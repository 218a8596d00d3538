"""Inception-v3's features, those of FID as published, through torchmetrics and torch-fidelity."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.members import is_image
from t2i_rl.core.numbers import Count, Pixels
from t2i_rl.core.pixels import read_image, square
from t2i_rl.core.ranks import is_main_process, own_gpu


class InceptionFeatures:
    """What FID compares pictures by, and the real pictures to compare with (Heusel et al. 2017):
    `callbacks.validation.fid`.

    With few pictures FID is biased upwards by far more than methods differ: 5,000 is what tables use. Compare at equal
    numbers only.

    Args:
        images: a folder of real pictures, such as COCO's `val2017`; all of them are taken, in order of name, and other
            files are counted in a line.
        size: pixels a side to which they are scaled and cropped, as training pictures are.
        weights: a local copy of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; None: it downloads it.
        device: `auto`: this process's GPU if there is one.

    Raises:
        UserError: torch-fidelity is not installed, or the folder has fewer than two pictures.
    """

    def __init__(
        self, images: str, size: Pixels = 512, weights: str | None = None, batch_size: Count = 32, device: str = "auto"
    ):
        files = sorted(file for file in Path(images).glob("*") if file.is_file())
        self.files = [file for file in files if is_image(file.name)]
        if len(self.files) < 2:
            raise UserError(f"fid.images={images}: a folder of pictures (.jpg, .png, .webp) is needed to compare with")
        if weights and not Path(weights).is_file():
            raise UserError(f"fid.weights={weights}: there is no such file")
        if find_spec("torch_fidelity") is None or find_spec("torchvision") is None:
            raise UserError(
                "Inception's FID needs torch-fidelity: pip install -c constraints.txt torch-fidelity, which brings the "
                "torchvision that fits torch (without -c it would replace torch)"
            )
        others = [file.name for file in files if not is_image(file.name)]
        if others and is_main_process():
            print(f"fid.images={images}: {len(others)} of {len(files)} files ignored (first: {others[0]})", flush=True)
        self.size, self.weights, self.batch_size = size, weights, batch_size
        self.device = own_gpu() if device == "auto" else device
        self.network: Any = None  # loaded when it is first asked
        self.real: np.ndarray | None = None

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 `(N, H, W, 3)` -> `(N, 2048)`, float64."""
        if self.network is None:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], self.weights).to(self.device).eval()
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        parts = [self.network(part.to(self.device)).double().cpu() for part in pixels.split(self.batch_size)]
        return torch.cat(parts).numpy()

    def reference_features(self) -> np.ndarray:
        """Of the real pictures `(M, 2048)`, computed once."""
        if self.real is None:
            parts = range(0, len(self.files), self.batch_size)
            self.real = np.concatenate([self.features(self._read(first)) for first in parts])
        return self.real

    def _read(self, first: int) -> np.ndarray:
        files = self.files[first : first + self.batch_size]
        return np.stack([square(read_image(file), self.size) for file in files])
