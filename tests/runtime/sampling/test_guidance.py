"""Classifier-free guidance: one call of both halves is two separate calls, combined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint.runtime.bundle.bundle import Bundle, open_bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.guidance import combine, doubled, doubled_conditions, guided, with_labels
from mezzotint.runtime.sampling.samplers import initial_noise, sample, seeded_noise
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import ClassLabels, Images, Signature, Timestep

Make = Callable[..., tuple[Path, dict[str, Any]]]
PROMPT = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
EMPTY = np.full((1, 4), -0.5, np.float32)


@pytest.fixture
def conditional(make_bundle: Make, denoiser_onnx: Callable[..., bytes], signature: Signature) -> Bundle:
    """Deployed with DDIM, eta 0.5, at guidance 3."""
    signature = replace(signature, conditions=("context",))
    model = denoiser_onnx(context="float[B,4]")
    return open_bundle(make_bundle(model=model, signature=signature, guidance=3.0, eta=0.5)[0])


def test_the_formula() -> None:
    output = initial_noise(1, (6, 2, 4, 4))
    without, given = output[:3], output[3:]
    np.testing.assert_allclose(combine(output, 3.0), without + 3.0 * (given - without), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(combine(output, 0.0), without)
    np.testing.assert_allclose(combine(output, 1.0), given, rtol=0, atol=1e-6)
    assert np.abs(combine(output, 3.0) - combine(output[::-1], 3.0)).max() > 0.1  # the order of the halves matters
    before = output.copy()
    assert not np.shares_memory(combine(output, 3.0), output)
    np.testing.assert_array_equal(output, before)
    np.testing.assert_array_equal(doubled(given), np.concatenate([given, given]))


def test_conditions_are_doubled_unconditional_rows_first() -> None:
    mask = np.ones((5, 2), np.int64)
    found = doubled_conditions({"context": PROMPT, "mask": mask}, {"context": EMPTY})
    np.testing.assert_array_equal(found["context"], np.concatenate([np.repeat(EMPTY, 5, axis=0), PROMPT]))
    np.testing.assert_array_equal(found["mask"], np.concatenate([mask, mask]))
    rows = np.arange(20, dtype=np.float32).reshape(5, 4)
    np.testing.assert_array_equal(doubled_conditions({"context": PROMPT}, {"context": rows})["context"][:5], rows)


def test_class_labels_that_were_left_out_are_all_classes_and_none(conditional: Bundle, signature: Signature) -> None:
    labelled = replace(signature, conditions=("label",), labels=(ClassLabels("label", 3, 7),))
    assert Signature.from_json(labelled.to_json()) == labelled
    plan, given = conditional.deployment, {"label": np.array([2])}

    rows, without = with_labels(labelled, plan, None, None, first=4)
    assert (rows["label"].tolist(), without["label"].tolist()) == ([1, 2, 0], [7])
    assert with_labels(labelled, replace(plan, guidance=1.0), {}, {})[1] == {}
    assert with_labels(labelled, plan, given, given) == (given, given)
    assert with_labels(signature, plan, {}, {}) == ({}, {}), "nothing is known to be class labels"


@pytest.mark.parametrize(
    ("unconditional", "message"),
    [
        ({}, "guidance needs unconditional rows"),
        ({"prompt": EMPTY}, "unconditional rows for 'prompt', which is no condition here"),
        ({"context": EMPTY[:, :3]}, r"unconditional 'context' has shape \[1, 3\], the condition \[5, 4\]"),
        ({"context": PROMPT[:3]}, r"has shape \[3, 4\]"),
        ({"context": EMPTY[0]}, r"has shape \[4\]"),
        ({"context": EMPTY.astype(np.float64)}, "is float64, the condition float32"),
    ],
)
def test_refused_unconditional_rows(unconditional: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        doubled_conditions({"context": PROMPT}, unconditional)


def by_two_calls(bundle: Bundle, scale: float, n: int = 5, seed: int = 4, eta: float | None = None) -> Images:
    """The loop with the network called twice, once with each set of rows."""
    network = Denoiser(bundle.model_path, bundle.signature, threads=1)

    def predict(x: Images, t: Timestep) -> Images:
        without = network(x, t, context=np.repeat(EMPTY, len(x), axis=0))
        return np.asarray(without + np.float32(scale) * (network(x, t, context=PROMPT[: len(x)]) - without))

    plan = bundle.plan(guidance=scale, eta=eta)
    x = initial_noise(seed, (n, *bundle.sample_shape))
    return sample(predict, x, bundle.schedule, plan, noise=seeded_noise(seed))


def check_images(found: Images, wanted: Images) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [None, 3.0, 1.5, 0.0])
def test_a_guided_bundle_samples_as_two_separate_calls_would(conditional: Bundle, scale: float | None) -> None:
    given: dict[str, Any] = {"conditions": {"context": PROMPT}, "unconditional": {"context": EMPTY}, "seed": 4}
    found = conditional.sample(5, guidance=scale, **given)
    used = 3.0 if scale is None else scale
    check_images(found, by_two_calls(conditional, used))
    check_images(conditional.sample(5, guidance=scale, batch=2, **given), found)
    with pytest.raises(AssertionError):
        check_images(found, by_two_calls(conditional, used + 0.1))


def test_scale_one_needs_no_unconditional_rows(conditional: Bundle) -> None:
    given = {"context": PROMPT}
    found = conditional.sample(5, conditions=given, guidance=1.0, seed=4)
    check_images(found, by_two_calls(conditional, 1.0))
    with pytest.raises(InputError, match="guidance needs unconditional rows"):
        conditional.sample(5, conditions=given)


def test_each_call_has_both_halves_in_one_batch() -> None:
    seen: list[tuple[int, ...]] = []

    def network(x: Images, t: Timestep, context: Images) -> Images:
        seen.append(x.shape)
        np.testing.assert_array_equal(x[:5], x[5:])
        return np.asarray(x + context[:, :1, None, None])

    x = initial_noise(1, (5, 1, 4, 4))
    predict = guided(network, doubled_conditions({"context": PROMPT}, {"context": EMPTY}), 2.0)
    found = predict(x, 3)
    np.testing.assert_allclose(found, x + (2 * PROMPT[:, 0] + 0.5)[:, None, None, None], rtol=0, atol=1e-5)
    assert seen == [(10, 1, 4, 4)]


def test_a_batch_that_is_written_into_the_graph_holds_both_halves(
    make_bundle: Make, denoiser_onnx: Callable[..., bytes], signature: Signature, conditional: Bundle
) -> None:
    signature = replace(signature, conditions=("context",))
    model = denoiser_onnx("int64[4]", batch="4", context="float[4,4]")
    options: dict[str, Any] = {"signature": signature, "guidance": 3.0, "eta": 0.5}
    fixed = open_bundle(make_bundle(model=model, name="fixed", **options)[0])
    given: dict[str, Any] = {"conditions": {"context": PROMPT}, "unconditional": {"context": EMPTY}, "seed": 4}
    check_images(fixed.sample(5, **given), conditional.sample(5, **given))
    check_images(
        fixed.sample(5, guidance=1.0, conditions={"context": PROMPT}, seed=4),
        conditional.sample(5, guidance=1.0, conditions={"context": PROMPT}, seed=4),
    )
    odd = denoiser_onnx("int64[3]", batch="3", context="float[3,4]")
    with pytest.raises(InputError, match="axis 0"):
        open_bundle(make_bundle(model=odd, name="odd", **options)[0]).sample(5, **given)
