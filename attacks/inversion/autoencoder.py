"""A small autoencoder learned from public images: its decoder is what the adversary believes images of this kind look like."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from flpriv.attacks.inversion.learning import cropped, crops, fit, padded
from flpriv.attacks.inversion.plan import Space
from flpriv.cache import recall
from flpriv.seeds import derive
from flpriv.state import State, fingerprint


class Net(nn.Module):
    """Patches to latents and back: their principal components to begin with, and convolutions that add what is between them.

    Latents ``(N, latents, *spatial / side)`` have a mean square of about 1 each on images like those it learned from.

    Args:
        channels: of the images.
        dims: spatial axes, 2 or 3.
        halvings: of every axis; a patch has a ``side`` of 2 to that power.
        latents: per patch, at most its number of values.
        width: channels of the convolutions.
    """

    middle: Tensor

    def __init__(self, channels: int, *, dims: int, halvings: int, latents: int, width: int) -> None:
        super().__init__()
        conv, back = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        self.side = 2**halvings
        self.encoder = conv(channels, latents, self.side, stride=self.side, bias=False)
        self.patches = back(latents, channels, self.side, stride=self.side, bias=False)
        self.register_buffer("middle", torch.zeros(channels, *[1] * dims))
        widths = [2 * width, *[width] * (halvings - 1)]
        layers: list[nn.Module] = [conv(latents, 2 * width, 3, padding=1), nn.LeakyReLU(0.1)]
        layers += [conv(2 * width, 2 * width, 3, padding=1), nn.LeakyReLU(0.1)]
        for before, after in pairwise(widths):
            layers += [back(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
        last = back(widths[-1], channels, 4, stride=2, padding=1)
        for weights in last.parameters():
            nn.init.zeros_(weights)
        self.between = nn.Sequential(*layers, last)

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images ``(N, C, *spatial)``."""
        latents: Tensor = self.encoder(padded(images, self.side) - self.middle)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images of whole patches."""
        images: Tensor = self.middle + self.patches(latents) + self.between(latents)
        return images

    def begin(self, images: Tensor) -> None:
        """Set the weights to the principal components of the patches of ``images``."""
        shape = self.encoder.weight.shape
        whole = padded(images, self.side)
        for axis in range(2, images.dim()):
            whole = whole.unfold(axis, self.side, self.side)
        rows = whole.movedim(1, images.dim() - 1).reshape(-1, shape[1:].numel())
        mean = rows.mean(0).view(shape[1], -1).mean(1)
        rows = rows - mean.repeat_interleave(self.side ** (images.dim() - 2))
        power, basis = torch.linalg.eigh(rows.T @ rows / len(rows))
        size = power[-shape[0] :].flip(0).clamp_min(1e-6 * float(power[-1]) + 1e-12).sqrt()[:, None]
        basis = basis[:, -shape[0] :].flip(1).T
        with torch.no_grad():
            self.encoder.weight.copy_((basis / size).view(shape))
            self.patches.weight.copy_((basis * size).view(shape))
            self.middle.copy_(mean.view(-1, *[1] * (images.dim() - 2)))


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """How an autoencoder is trained.

    Args:
        latents: per patch of 8 pixels (4 in volumes) along each axis, ≥ 1.
        width: channels of its convolutions.
        steps: of training, ≥ 1.
        batch: images a step.
        noise: standard deviation of what is added to latents in training, so that near latents mean near images.
    """

    latents: int = 8
    width: int = 24
    steps: int = 600
    batch: int = 8
    noise: float = 0.05

    def space(self, public: Tensor, *, device: torch.device, seed: int = 0) -> Space:
        """Latents to search over, learned from ``public`` ``(M, C, *spatial)`` in [0, 1] or recalled from the cache."""
        spatial = public.shape[2:]
        key = {"net": asdict(self), "public": fingerprint({"images": public}), "seed": seed, "version": 1}
        net = self.build(public.shape[1:], seed=seed)
        net.load_state_dict(recall("autoencoder", key, lambda: self.learn(public, seed=seed)))
        net.requires_grad_(False).to(device)
        return Space(
            encode=lambda images, labels: net.encode(images),
            decode=lambda trial, labels: (cropped(net.decode(trial), spatial), labels),
        )

    def build(self, shape: tuple[int, ...], *, seed: int) -> Net:
        """The untrained network for images of ``shape`` ``(C, *spatial)``."""
        dims = len(shape) - 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "autoencoder", "weights"))
            return Net(shape[0], dims=dims, halvings=3 if dims == 2 else 2, latents=self.latents, width=self.width)

    def learn(self, public: Tensor, *, seed: int) -> State:
        """Weights that lead images back to themselves, by mean squared error."""
        rng = torch.Generator().manual_seed(derive(seed, "autoencoder"))
        net = self.build(public.shape[1:], seed=seed)
        net.begin(public)
        side = 64 if public.dim() == 4 else 24

        def loss() -> Tensor:
            (images,) = crops((public,), count=self.batch, side=side, rng=rng)
            latents = net.encode(images)
            latents = latents + self.noise * torch.randn(latents.shape, generator=rng)
            return functional.mse_loss(cropped(net.decode(latents), images.shape[2:]), images)

        fit(net, loss, steps=self.steps, lr=2e-3, what="autoencoder: training")
        return net.state_dict()
