"""The images and labels that the digits networks learn from, and what they see of them at each step.

A network of the schedule's kind learns one of two things: the noise in an image between the timesteps of a schedule of
betas (Ho et al. 2020, the simple loss), or, for flow matching, the velocity noise - image at a sigma that is drawn from
a logit-normal distribution (Esser et al. 2024), its timestep 1000 sigma. A network with class labels is shown the null
class in place of a tenth of them, so that it can be guided.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.schedule import Schedule

CLASSES = 10
DROPPED = 0.1  # share of the labels that the null class replaces


def load_images(data: Path, size: int) -> npt.NDArray[np.uint8]:
    """The images of an npz file (or of the folder that holds `mnist_train.npz`), padded to uint8 [N, size, size]."""
    path = data / "mnist_train.npz" if data.is_dir() else data
    try:
        with np.load(path, allow_pickle=False) as archive:
            images: npt.NDArray[np.uint8] = archive["x"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot read the images: {error}",
            where=str(path),
            hint="--data takes an npz file with `x` uint8 [N, H, W]",
        ) from error
    if images.ndim != 3 or images.dtype != np.uint8 or len(images) == 0 or max(images.shape[1:]) > size:
        raise InputError(
            f"`x` is {images.dtype} {list(images.shape)}, expected uint8 [N, H, W] of at most {size}x{size}",
            where=str(path),
        )
    rest = [size - images.shape[1], size - images.shape[2]]
    return np.pad(images, [(0, 0), *((r // 2, r - r // 2) for r in rest)])


def load_labels(data: Path, images: int) -> npt.NDArray[np.int64]:
    """The labels `[images]`, 0 to 9, of the same npz file or folder. Raises InputError."""
    path = data / "mnist_train.npz" if data.is_dir() else data
    try:
        with np.load(path, allow_pickle=False) as archive:
            labels: npt.NDArray[np.generic] = archive["y"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read the labels: {error}", where=str(path)) from error
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise InputError(f"`y` is {labels.dtype} {list(labels.shape)}, expected integers [{images}]", where=str(path))
    found = labels.astype(np.int64)
    if found.min() < 0 or found.max() >= CLASSES:
        raise InputError(f"labels go from {found.min()} to {found.max()}, expected 0 to 9", where=str(path))
    return found


class Batches:
    """The batch of each step: a function of (seed, step) alone. Epochs are permutations; an epoch's rest is dropped."""

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        schedule: Schedule,
        *,
        seed: int,
        batch: int,
        labels: npt.NDArray[np.int64] | None = None,
    ) -> None:
        if len(images) < batch:
            raise InputError(f"{len(images)} images are fewer than one batch of {batch}", where="--batch")
        if schedule.prediction not in ("epsilon", "flow_prediction"):
            raise InputError(
                f"this tool trains the prediction of noise or of flow, not {schedule.prediction!r}", where="--config"
            )
        self.images, self.labels, self.schedule = images, labels, schedule
        self.seed, self.batch = seed, batch
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def at(self, step: int) -> tuple[torch.Tensor, ...]:
        """What the network is given at a step, and behind it what it should predict `[B, 1, H, W]` float32.

        Given are noisy images `[B, 1, H, W]` float32, timesteps `[B]` and, where there are any, labels `[B]` int64.
        """
        seed, batch = self.seed, self.batch
        epoch, position = divmod(step, len(self.images) // batch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([seed, 0, epoch]).permutation(len(self.images))
        chosen = self._order[position * batch : (position + 1) * batch]
        clean = self.images[chosen][:, None].astype(np.float32) / 127.5 - 1
        random = np.random.default_rng([seed, 1, step])
        if self.schedule.flow:
            sigmas = 1 / (1 + np.exp(-random.standard_normal(batch, np.float32)))
            noise = random.standard_normal(clean.shape, np.float32)
            share = sigmas[:, None, None, None]
            noisy, wanted = (1 - share) * clean + share * noise, noise - clean
            timesteps: npt.NDArray[np.generic] = self.schedule.num_train_timesteps * sigmas
        else:
            timesteps = random.integers(0, len(self.schedule.alphas_cumprod), batch)
            wanted = random.standard_normal(clean.shape, np.float32)
            signal = self.schedule.alphas_cumprod[timesteps][:, None, None, None]
            noisy = (np.sqrt(signal) * clean + np.sqrt(1 - signal) * wanted).astype(np.float32)
        given = [torch.from_numpy(noisy), torch.from_numpy(timesteps)]
        if self.labels is not None:
            shown = np.where(random.random(batch) < DROPPED, CLASSES, self.labels[chosen])
            given.append(torch.from_numpy(shown))
        return *given, torch.from_numpy(wanted)
