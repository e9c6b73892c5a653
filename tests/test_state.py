"""Update arithmetic touches parameters alone and keeps keys, shapes and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flpriv.errors import UpdateError
from flpriv.state import add, check_finite, check_like, difference, is_parameter, norm, parameters

NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6)


def batch_norm(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    return {
        key: torch.randn_like(value) if value.is_floating_point() else value + seed for key, value in model.state_dict().items()
    }


def test_running_statistics_and_counters_are_no_parameters() -> None:
    state = batch_norm(0)
    assert set(state) - set(parameters(state)) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not is_parameter("steps", torch.tensor(3))
    assert is_parameter("running_mean.weight", torch.zeros(1))


def test_difference_then_add_gives_the_parameters_back() -> None:
    before, after = batch_norm(1), batch_norm(2)
    kept = {key: value.clone() for key, value in before.items()}
    update = difference(after, before)
    assert set(update) == set(parameters(before))
    restored = add(before, update)
    for key, value in before.items():
        torch.testing.assert_close(restored[key], after[key] if key in update else value, rtol=1e-6, atol=1e-6)
        assert torch.equal(value, kept[key]), "the state itself is not changed"


@given(NUMBERS, NUMBERS)
def test_addition_and_difference_are_inverse(left: list[float], right: list[float]) -> None:
    size = min(len(left), len(right))
    before, update = {"w": torch.tensor(left[:size])}, {"w": torch.tensor(right[:size])}
    torch.testing.assert_close(difference(add(before, update), before)["w"], update["w"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_small_differences_are_wide(dtype: torch.dtype) -> None:
    before, after = {"w": torch.ones(3, dtype=dtype)}, {"w": torch.full((3,), 1.5, dtype=dtype)}
    update = difference(after, before)
    assert update["w"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    back = add(before, update)["w"]
    assert back.dtype == dtype
    assert torch.equal(back, after["w"])


@given(NUMBERS, NUMBERS)
def test_norm_is_that_of_all_entries_together(left: list[float], right: list[float]) -> None:
    together = torch.linalg.vector_norm(torch.tensor(left + right, dtype=torch.float64))
    torch.testing.assert_close(norm({"a": torch.tensor(left), "b": torch.tensor(right)}), together)


def test_norm_of_nothing_is_zero() -> None:
    assert norm({}).item() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_layer_that_is_not_finite_is_named(bad: float) -> None:
    state = {"a": torch.ones(2), "count": torch.tensor(3), "b": torch.tensor([1.0, bad])}
    with pytest.raises(UpdateError, match="site North: layer 'b' holds NaN or infinite"):
        check_finite(state, who="site North")
    check_finite({"a": torch.ones(2), "count": torch.tensor(3)}, who="site North")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.ones(2)}, "layer 'b' is missing"),
        ({"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)}, "layer 'c' is not part of the model"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, r"layer 'b' has shape \(2,\), expected \(1,\)"),
    ],
)
def test_a_state_of_another_model_is_refused(state: dict[str, Tensor], message: str) -> None:
    like = {"a": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(UpdateError, match=f"node 3: {message}"):
        check_like(state, like, who="node 3")
    check_like(dict(reversed(like.items())), like, who="node 3")
