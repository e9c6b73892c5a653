from __future__ import annotations

import torch

from flpriv.attacks.malicious.deeper import shown
from flpriv.attacks.malicious.insertion import received
from flpriv.task import Task


def test_images_are_found_behind_what_a_layer_received() -> None:
    task = Task(modality="xray", shape=(1, 12, 12), classes=("a", "b"), model="cnn", mean=0.5, std=0.2)
    sent = task.build(seed=3).state_dict()
    model = task.build(seed=3).eval()
    images = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    features = received(model, images, "conv2").detach().flatten(1)
    extra = {**sent, "conv2.trap.bins.weight": torch.zeros(1)}
    found = shown(task, extra, features, before="conv2", rng=torch.Generator().manual_seed(1), iterations=300)
    assert found.shape == images.shape and float((found - images).square().mean()) < 1e-5
