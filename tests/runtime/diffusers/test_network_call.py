"""Calls of diffusers' networks as the inputs of a graph, without a graph: forms, timesteps, and what an export kept."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.runtime.bundle.network_call import call_record, difference, is_record
from mezzotint.runtime.diffusers.network_arguments import ArgumentReader
from mezzotint.runtime.diffusers.network_classes import NETWORK_CLASSES
from mezzotint.runtime.diffusers.network_time import training_time
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.signature import Signature, TimestepUnit


def reader(name: str, sample: str, shape: tuple[int, ...], axis: int = 1, **conditions: Any) -> ArgumentReader:
    """A reader for a graph that declares these conditions: (dtype, sizes behind the batch)."""
    signature = Signature(sample, "timestep", "out", tuple(conditions), channel_axis=axis)
    bundle: Any = SimpleNamespace(signature=signature, sample_shape=shape, path="bundle")
    declared = {name: (np.dtype(dtype), ("batch", *sizes)) for name, (dtype, sizes) in conditions.items()}
    denoiser: Any = SimpleNamespace(inputs={sample: (np.dtype(np.float32), ("batch", *shape)), **declared})
    return ArgumentReader(bundle, denoiser, name, {})


class TestForms:
    """Each form in which a pipeline calls, as the form of the export."""

    def test_animatediff_repeats_its_prompt(self) -> None:
        read = reader("UNetMotionModel", "sample", (4, 3, 8, 8), encoder_hidden_states=("f4", (2, 5))).read
        sample, prompts = torch.zeros(2, 4, 3, 8, 8), torch.randn(2, 2, 5)
        call = {"sample": sample, "timestep": 5, "encoder_hidden_states": prompts.repeat_interleave(3, dim=0)}

        assert np.array_equal(read(call)[2]["encoder_hidden_states"], prompts.numpy())
        assert np.array_equal(read({**call, "encoder_hidden_states": prompts})[2]["encoder_hidden_states"], prompts)
        with pytest.raises(InputError, match="different prompts"):
            read({**call, "encoder_hidden_states": torch.randn(6, 2, 5)})

    def test_stable_video_diffusion_joins_an_image(self) -> None:
        one = reader("UNetSpatioTemporalConditionModel", "sample", (3, 4, 8, 8), 2, image_latents=("f4", (3, 4, 8, 8)))
        joined = torch.randn(2, 3, 8, 8, 8)

        sample, _, conditions = one.read({"sample": joined, "timestep": 5})

        assert torch.equal(sample, joined[:, :, :4])
        assert np.array_equal(conditions["image_latents"], joined[:, :, 4:])

    def test_z_image_has_lists(self) -> None:
        inputs: dict[str, Any] = {"cap_feats": ("f4", (5, 12)), "cap_feats_mask": ("i8", (5,))}
        one = reader("ZImageTransformer2DModel", "x", (4, 8, 8), 1, **inputs)
        images, prompts = list(torch.randn(2, 4, 1, 8, 8)), [torch.randn(4, 12), torch.randn(2, 12)]

        sample, time, conditions = one.read({"x": images, "t": torch.ones(2), "cap_feats": prompts})

        assert torch.equal(sample, torch.stack(images)[:, :, 0]) and len(time) == 2
        assert conditions["cap_feats_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
        for row, prompt in zip(conditions["cap_feats"], prompts, strict=True):
            assert np.array_equal(row[: len(prompt)], prompt) and not row[len(prompt) :].any()
        answered = NETWORK_CLASSES["ZImageTransformer2DModel"].answered
        assert answered is not None
        assert [tuple(part.shape) for part in answered(sample)] == [(4, 1, 8, 8)] * 2
        with pytest.raises(InputError, match=r"different shapes: \[4, 12\], \[2, 3\]"):
            one.read({"x": images, "t": torch.ones(2), "cap_feats": [prompts[0], prompts[1][:, :3]]})
        with pytest.raises(InputError, match="not images with one frame"):
            one.read({"x": [i.repeat(1, 2, 1, 1) for i in images], "t": torch.ones(2), "cap_feats": prompts})
        with pytest.raises(InputError, match="'x' is no list"):
            one.read({"x": torch.zeros(2, 4, 8, 8), "t": torch.ones(2), "cap_feats": prompts})

    def test_hunyuan_dit_cuts_variances_off(self) -> None:
        answered = NETWORK_CLASSES["HunyuanDiT2DModel"].answered
        prediction = torch.randn(2, 4, 8, 8)
        assert answered is not None
        assert torch.equal(answered(prediction).chunk(2, dim=1)[0], prediction)

    def test_residuals_are_named_by_their_order(self) -> None:
        names: dict[str, Any] = {f"down_block_additional_residuals_{i}": ("f4", (8,)) for i in range(2)}
        one = reader("UNet2DConditionModel", "sample", (4, 8, 8), **names, text_embeds=("f4", (6,)))
        residuals, pooled = (torch.ones(1, 8), torch.zeros(1, 8)), torch.randn(1, 6)
        added = {"text_embeds": pooled}
        call = {"sample": torch.zeros(1, 4, 8, 8), "timestep": 3, "added_cond_kwargs": added}

        found = one.read({**call, "down_block_additional_residuals": residuals})[2]

        assert [float(found[name].max()) for name in names] == [1, 0]
        assert np.array_equal(found["text_embeds"], pooled)
        with pytest.raises(InputError, match=r"cannot use down_block_additional_residuals\[2\]"):
            one.read({**call, "down_block_additional_residuals": (*residuals, residuals[0])})

    def test_masks(self) -> None:
        one = reader("ChromaTransformer2DModel", "hidden_states", (4, 8), 2, attention_mask=("f4", (3,)))
        call = {"hidden_states": torch.zeros(2, 4, 8), "timestep": torch.ones(2)}

        assert np.array_equal(one.read(call)[2]["attention_mask"], np.ones((2, 3), np.float32)), "none hides nothing"
        flags = torch.ones(2, 3, dtype=torch.bool)
        assert one.read({**call, "attention_mask": flags})[2]["attention_mask"].dtype == np.float32
        flags[0, 0] = False
        with pytest.raises(InputError, match="a boolean mask, and the bundle was compiled for numbers"):
            one.read({**call, "attention_mask": flags})

    def test_a_mask_that_is_left_out_has_the_length_of_the_prompt(self) -> None:
        prompt, mask = ("f4", ("tokens", 5)), ("f4", ("tokens + 3",))
        one = reader("ChromaTransformer2DModel", "hidden_states", (3, 8), 2, encoder_hidden_states=prompt, mask=mask)
        call = {"hidden_states": torch.zeros(2, 3, 8), "timestep": torch.ones(2)}

        for tokens in (4, 9):
            found = one.read({**call, "encoder_hidden_states": torch.zeros(2, tokens, 5)})[2]
            assert found["mask"].shape == (2, tokens + 3) and found["mask"].all()
        assert "mask" not in one.read(call)[2], "no prompt says its length"

    def test_a_length_that_the_graph_fixes(self) -> None:
        one = reader("HunyuanDiT2DModel", "hidden_states", (4, 8, 8), encoder_hidden_states=("f4", (5, 12)))
        call = {"hidden_states": torch.zeros(1, 4, 8, 8), "timestep": torch.ones(1)}
        with pytest.raises(InputError, match=r"shape \[1, 3, 12\], and .* \['batch', 5, 12\]") as caught:
            one.read({**call, "encoder_hidden_states": torch.zeros(1, 3, 12)})
        assert "max_sequence_length" in (caught.value.hint or "")


UNITS: list[tuple[TimestepUnit, float, float]] = [
    ("steps", 857.6923, 857.6923),
    ("fraction", 0.8576923, 857.6923),
    ("reversed_fraction", 1 - 0.8576923, 857.6923),
]


@pytest.mark.parametrize(("unit", "given", "meant"), UNITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_timestep_is_that_of_the_nearest_row_within_its_rounding(
    unit: TimestepUnit, given: float, meant: float, dtype: torch.dtype
) -> None:
    signature, rows = Signature("x", "t", "out", timestep_unit=unit), (meant, 400.0, 866.5)
    t = torch.full((2,), given).to(dtype)
    if unit == "reversed_fraction" and dtype is torch.bfloat16:
        t = torch.full((2,), given)  # its pipelines compute the difference in float32

    got = training_time(t, signature, rows)

    exact = unit == "steps" and dtype is torch.float32  # passed on as it is
    assert got.shape == (2,) and np.allclose(got, meant, rtol=0, atol=1e-3 if exact else 0)
    far = training_time(t * 0.97, signature, rows)
    assert not np.isin(far, rows).any(), "another timestep stays one, and is refused"
    assert training_time(t, signature, None).shape == (2,)


COUNTED = {"first": [4, 0], "step": [0, 1]}
"""A row for each token of a prompt."""


def entry(value: Any) -> dict[str, Any]:
    record = call_record({"a": value})
    assert is_record(record)
    found: dict[str, Any] = record["arguments"]["a"]
    return found


@pytest.mark.parametrize(
    ("kept", "given", "complaint"),
    [
        (3, 3, None),
        (3, 4, "is 4, and was 3"),
        ((0.32, 32, 32), (8 / 25, 32, 32), None),
        ((0.32, 32, 32), (8 / 30, 32, 32), "and was"),
        ([[(1, 4, 4)]], [[(1, 4, 4)]], None),
        ([[(1, 4, 4)]], [[(1, 4, 8)]], "and was"),
        (None, None, None),
        (None, 0, "is 0, and was None"),
        (np.arange(12.0).reshape(4, 3), np.arange(12.0).reshape(4, 3), None),
        (np.arange(12.0).reshape(4, 3), np.tile(np.arange(12.0).reshape(4, 3), (2, 1, 1)), None),
        (np.arange(12.0).reshape(4, 3), np.arange(24.0).reshape(2, 4, 3), r"shape \[2, 4, 3\], and had \[4, 3\]"),
        (np.arange(12.0).reshape(4, 3), np.arange(12.0).reshape(3, 4), "shape"),
        (np.arange(12.0), np.arange(12.0)[::-1], "other values"),
        (np.zeros(5000), np.eye(1, 5000, 1)[0], "other values"),
        (np.arange(12.0), 3, "is no tensor"),
        ((np.zeros(3), np.ones(3)), (np.zeros(3), np.ones(3)), None),
        ((np.zeros(3), np.ones(3)), (np.ones(3), np.ones(3)), "other values"),
        ((np.zeros(3), np.ones(3)), np.ones(3), "not the 2 tensors"),
        (COUNTED, np.array([[4.0, 0], [4, 1], [4, 2]]), None),
        (COUNTED, np.array([[[4.0, 0], [4, 1]]] * 2), None),
        (COUNTED, np.array([[4.0, 0], [4, 1], [4, 3]]), "other values"),
        (COUNTED, np.zeros((3, 3)), r"shape \[3, 3\], and had \[tokens, 2\]"),
    ],
)
def test_what_an_export_kept_is_compared(kept: Any, given: Any, complaint: str | None) -> None:
    found = difference(entry(kept), given)

    assert (found is None) == (complaint is None)
    assert complaint is None or re.search(complaint, found or "")


def test_rounded_positions_mean_the_same() -> None:
    ids = np.arange(1000.0)
    rounded = torch.from_numpy(ids).bfloat16().float().numpy()

    assert difference(entry(ids), rounded) is not None
    assert difference(entry(ids), rounded, torch.finfo(torch.bfloat16).eps) is None


@pytest.mark.parametrize(
    "data",
    [
        *(None, [], {}, {"arguments": {"a": 1}}, {"arguments": {"a": {"parts": [{"value": 1}]}}}),
        {"arguments": {"a": {"first": [1, 2], "step": [1]}}},
    ],
)
def test_other_data_is_no_record(data: Any) -> None:
    assert not is_record(data)
