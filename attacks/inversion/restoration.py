"""A restoration network: what a search leaves blurred or noisy, made good by what public images teach about its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.learning import cropped, crops, fit, padded
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.rehearsal import circumstances
from flpriv.attacks.inversion.simulation import Pairs, known_images, simulate
from flpriv.cache import recall
from flpriv.capture import Capture
from flpriv.seeds import derive
from flpriv.state import State


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """How a restoration network is trained.

    Args:
        updates: of public images, simulated and attacked to learn from, ≥ 1.
        steps: of training, ≥ 1.
        batch: images a step.
        side: of the random crops it learns from, along each axis; 0 for 64 pixels, 24 in volumes.
        width: channels at half the size; 0 for 40, 20 in volumes.
    """

    updates: int = 24
    steps: int = 400
    batch: int = 8
    side: int = 0
    width: int = 0

    def of(self, plan: Plan, evidence: Evidence, capture: Capture, *, key: Mapping[str, Any], seed: int = 0) -> Restorer:
        """The network for what ``plan`` finds of updates like ``evidence``, trained or recalled from the cache.

        Args:
            plan: how images are searched for.
            evidence: whose model, recipe and defences are simulated; its update is not looked at.
            capture: with public images, all that is learned from.
            key: plain data that names ``plan``.
            seed: of everything.

        Raises:
            FlprivError: without public images.
        """
        whole = {**circumstances(evidence, capture, seed=seed), "net": asdict(self), "plan": dict(key), "version": 1}
        public = known_images(capture, who="restoration").images
        net = self.build(capture.task.shape, seed=seed)

        def make() -> State:
            rng = torch.Generator().manual_seed(derive(seed, "restoration"))
            pairs = simulate(plan, evidence, capture, updates=self.updates, rng=rng, what="restoration")
            return self.learn(pairs, public, seed=seed)

        net.load_state_dict(recall("restoration", whole, make))
        return net.requires_grad_(False).to(evidence.labels.device)

    def build(self, shape: tuple[int, ...], *, seed: int) -> Restorer:
        """The untrained network for images of ``shape`` ``(C, *spatial)``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "restoration", "weights"))
            return Restorer(shape, width=self.width or (40 if len(shape) == 3 else 20))

    def learn(self, pairs: Pairs, public: Tensor, *, seed: int) -> State:
        """Weights that lead from what was found to what should have been, by mean squared error.

        Half of each batch are pairs, half are public images degraded as the pairs are on average (:class:`Degradation`).
        """
        rng = torch.Generator().manual_seed(derive(seed, "restoration", "training"))
        net, degraded = self.build(tuple(public.shape[1:]), seed=seed), Degradation.of(pairs)
        net.filter.copy_(torch.view_as_real(degraded.back))
        net.mean.copy_(degraded.mean)
        side = self.side or (64 if public.dim() == 4 else 24)
        half = max(1, self.batch // 2)

        def loss() -> Tensor:
            drawn = public[torch.randint(len(public), (half,), generator=rng)]
            parts = []
            for found, images in ((pairs.found, pairs.images), (degraded(drawn, rng=rng), drawn)):
                parts.append(crops((found, net.filtered(found), images), count=half, side=side, rng=rng))
            found, filtered, images = (torch.cat(part) for part in zip(*parts, strict=True))
            return functional.mse_loss(net.changed(found, filtered), images)

        fit(net, loss, steps=self.steps, lr=2e-3, what="restoration: training")
        return net.state_dict()


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """What a search does to images, frequency by frequency: the linear filter and the noise that explain pairs best.

    Spectra are smoothed over neighbouring frequencies.

    Args:
        mean: intensity that is left as it is.
        transfer: ``(1, C, *spatial)`` complex, <found, image> / <image, image>.
        left: ``(1, C, *spatial)`` root of the power that the filter leaves unexplained.
        back: ``(1, C, *spatial)`` complex, <image, found> / <found, found>: Wiener's filter from what was found to the image.
    """

    mean: Tensor
    transfer: Tensor
    left: Tensor
    back: Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> Degradation:
        """Estimated from ``pairs``."""
        mean = pairs.images.mean()
        found, true = _spectrum(pairs.found - mean), _spectrum(pairs.images - mean)
        cross, powers = _smoothed(found * true.conj()), [_smoothed(one.abs().square()) for one in (true, found)]
        transfer, back = cross / powers[0].clamp_min(1e-12), cross.conj() / powers[1].clamp_min(1e-12)
        return cls(mean=mean, transfer=transfer, left=_smoothed((found - transfer * true).abs().square()).sqrt(), back=back)

    def __call__(self, images: Tensor, *, rng: torch.Generator) -> Tensor:
        """Images ``(N, C, *spatial)`` as the search would leave them, in [0, 1]."""
        noise = _spectrum(torch.randn(images.shape, generator=rng)) / images[0, 0].numel() ** 0.5
        return _image(self.transfer * _spectrum(images - self.mean) + self.left * noise).add(self.mean).clamp(0, 1)


def _spectrum(images: Tensor) -> Tensor:
    found: Tensor = torch.fft.fftn(images, dim=tuple(range(2, images.dim())))
    return found


def _image(spectrum: Tensor) -> Tensor:
    found: Tensor = torch.fft.ifftn(spectrum, dim=tuple(range(2, spectrum.dim()))).real
    return found


def _smoothed(spectra: Tensor) -> Tensor:
    """``(M, C, *spatial)`` to ``(1, C, *spatial)``: the mean over images and over neighbours along every axis."""
    mean = spectra.mean(0, keepdim=True)
    for axis in range(2, mean.dim()):
        mean = (mean.roll(-1, axis) + mean + mean.roll(1, axis)) / 3
    return mean


class Restorer(nn.Module):
    """Wiener's filter, and a residual U-Net on what was found and what the filter made of it.

    The U-Net works at a half and a quarter of the size, without normalisation. Untrained, the whole changes nothing.

    Args:
        shape: of an image, ``(C, *spatial)``, two or three spatial axes of any length.
        width: channels of the U-Net at half the size; twice as many at a quarter.
    """

    filter: Tensor
    mean: Tensor

    def __init__(self, shape: tuple[int, ...], *, width: int) -> None:
        super().__init__()
        two = len(shape) == 3
        conv, back = (nn.Conv2d, nn.ConvTranspose2d) if two else (nn.Conv3d, nn.ConvTranspose3d)

        def near(before: int, after: int) -> nn.Module:
            return nn.Sequential(conv(before, after, 3, padding=1), nn.LeakyReLU(0.1))

        def smaller(before: int, after: int) -> nn.Module:
            return nn.Sequential(conv(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.1))

        self.register_buffer("filter", torch.view_as_real(torch.ones(1, *shape, dtype=torch.complex64)))
        self.register_buffer("mean", torch.zeros(()))
        self.down = nn.Sequential(smaller(2 * shape[0], width), near(width, width))
        self.below = nn.Sequential(smaller(width, 2 * width), near(2 * width, 2 * width), back(2 * width, width, 2, stride=2))
        self.up = nn.Sequential(near(2 * width, width), near(width, width))
        self.change = back(width, shape[0], 4, stride=2, padding=1)
        for name, weights in self.named_parameters():
            if weights.dim() > 1 and not name.startswith("change"):
                nn.init.kaiming_normal_(weights)
            else:
                nn.init.zeros_(weights)

    def filtered(self, found: Tensor) -> Tensor:
        """Images ``(N, *shape)`` after the filter alone."""
        return _image(_spectrum(found - self.mean) * torch.view_as_complex(self.filter)) + self.mean

    def changed(self, found: Tensor, filtered: Tensor) -> Tensor:
        """``filtered`` after the U-Net; images or crops of them, ``(N, C, *spatial)``."""
        half = self.down(padded(torch.cat([found, filtered], 1), 4) - 0.5)
        change = self.change(self.up(torch.cat([half, self.below(half)], 1)))
        return filtered + cropped(change, found.shape[2:])

    def forward(self, found: Tensor) -> Tensor:
        """Restored images ``(N, *shape)``."""
        return self.changed(found, self.filtered(found))
