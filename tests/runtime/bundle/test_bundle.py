"""Bundles on disk: opened, distrusted when changed, and sampled from as the loop itself would."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.runtime.bundle.bundle import (
    CORRECTION,
    MANIFEST,
    MODEL,
    file_sha256,
    open_bundle,
    seal_bundle,
)
from mezzotint.runtime.bundle.manifest import Manifest, manifest_digest
from mezzotint.runtime.errors import BundleError, InputError, InterpolatedCorrection, TimestepNotDeployed
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.samplers import initial_noise, run_solver, sample, seeded_noise
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.sampling.solvers import ddim, ddpm
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Signature

Make = Callable[..., tuple[Path, dict[str, Any]]]
ROWS = (900, 800, 700, 600, 500, 400, 300, 200, 100, 0)


def check_images(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_a_bundle_says_what_it_is(make_bundle: Make) -> None:
    folder, manifest = make_bundle(deployed=ROWS)
    bundle = open_bundle(folder)
    assert bundle.manifest.to_json() == json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert bundle.manifest.digest == manifest["digest"]
    assert bundle.sample_shape == (1, 8, 8)
    assert bundle.deployment.timesteps == ROWS == bundle.deployed_timesteps
    assert bundle.model_path == folder / MODEL
    assert bundle.schedule.num_train_timesteps == 1000
    assert bundle.correction is None
    assert bundle.manifest.files[MODEL].sha256 == file_sha256(folder / MODEL)
    assert bundle.denoiser(1) is bundle.denoiser(1)
    assert bundle.denoiser(1).threads == 1
    assert bundle.deployed_steps() == (1, 2, 5, 10)


def test_samples_are_those_of_the_loop(make_bundle: Make, signature: Signature) -> None:
    bundle = open_bundle(make_bundle()[0])
    network = Denoiser(bundle.model_path, signature, threads=1)
    x = initial_noise(7, (5, 1, 8, 8))
    noise = seeded_noise(7)
    wanted = {
        "ddim": run_solver(network, x, ddim(bundle.schedule, ROWS)),
        "eta": run_solver(network, x, ddim(bundle.schedule, ROWS, eta=0.5), noise=noise),
        "ddpm": run_solver(network, x, ddpm(bundle.schedule, bundle.schedule.timesteps(20)), noise=noise),
    }
    found = {
        "ddim": bundle.sample(5, seed=7),
        "eta": bundle.sample(5, seed=7, eta=0.5),
        "ddpm": bundle.sample(5, seed=7, sampler="ddpm", steps=20),
    }
    for name, images in wanted.items():
        check_images(found[name], images)
        with pytest.raises(AssertionError):
            check_images(found[name] * np.float32(1.01), images)
    assert not np.allclose(found["ddim"], bundle.sample(5, seed=8))


def test_an_image_does_not_depend_on_its_batch(make_bundle: Make) -> None:
    bundle = open_bundle(make_bundle(sampler="ddpm")[0])
    calls: list[tuple[int, int]] = []
    whole = bundle.sample(7, seed=3, batch=7)
    parts = bundle.sample(7, seed=3, batch=3, progress=lambda done, total: calls.append((done, total)))
    check_images(parts, whole)
    check_images(bundle.sample(2, seed=3), whole[:2])
    assert calls == [(i + 1, 30) for i in range(30)]


def test_a_batch_that_is_written_into_the_graph(make_bundle: Make, denoiser_onnx: Callable[..., bytes]) -> None:
    fixed = open_bundle(make_bundle(model=denoiser_onnx("int64[4]", batch="4"))[0])
    free = open_bundle(make_bundle(name="free")[0])
    check_images(fixed.sample(6, seed=1), free.sample(6, seed=1))


def test_conditions_follow_their_images(
    make_bundle: Make, denoiser_onnx: Callable[..., bytes], signature: Signature
) -> None:
    signature = replace(signature, conditions=("context",))
    bundle = open_bundle(make_bundle(model=denoiser_onnx(context="float[B,4]"), signature=signature)[0])
    context = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    whole = bundle.sample(5, conditions={"context": context}, batch=5)
    check_images(bundle.sample(5, conditions={"context": context}, batch=2), whole)
    same = bundle.sample(5, conditions={"context": context[:1]}, batch=2)
    check_images(same, bundle.sample(5, conditions={"context": np.repeat(context[:1], 5, axis=0)}))
    assert not np.allclose(same, whole)
    in_turn = bundle.sample(5, conditions={"context": context[[0, 1, 2, 0, 1]]}, batch=5)
    check_images(bundle.sample(5, conditions={"context": context[:3]}, batch=2), in_turn)
    for broken, complaint in (
        (context[:0], r"condition 'context' has shape \[0, 4\]"),
        (context * np.float32("nan"), "NaN or infinite values in row 0"),
    ):
        with pytest.raises(InputError, match=complaint):
            bundle.sample(5, conditions={"context": broken})
    with pytest.raises(InputError, match="conditions"):
        bundle.sample(5)


def test_later_images_alone(make_bundle: Make, denoiser_onnx: Callable[..., bytes], signature: Signature) -> None:
    signature = replace(signature, conditions=("context",))
    made = make_bundle(sampler="ddpm", model=denoiser_onnx(context="float[B,4]"), signature=signature)
    bundle = open_bundle(made[0])
    context = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    whole = bundle.sample(7, seed=3, conditions={"context": context})
    for first, n, batch in ((0, 7, 2), (4, 3, 2), (6, 1, 16)):
        rows = {"context": context[first : first + n]}
        check_images(bundle.sample(n, seed=3, first=first, batch=batch, conditions=rows), whole[first : first + n])
        with pytest.raises(AssertionError):
            check_images(bundle.sample(n, seed=3, first=first + 1, conditions=rows), whole[first : first + n])
    with pytest.raises(InputError, match="first image -1 must not be negative"):
        bundle.sample(1, first=-1, conditions={"context": context[:1]})


def test_correction_applies_where_it_was_fitted(make_bundle: Make) -> None:
    bundle = open_bundle(make_bundle(correction=True)[0])
    table = bundle.correction
    assert table is not None
    assert bundle.correction_for(bundle.deployment) is table
    network = bundle.denoiser()
    x = initial_noise(0, (2, 1, 8, 8))
    corrected = run_solver(network, x, ddim(bundle.schedule, ROWS), correction=table)
    plain = run_solver(network, x, ddim(bundle.schedule, ROWS))
    check_images(bundle.sample(2), corrected)
    check_images(bundle.sample(2, correction=True), corrected)
    check_images(bundle.sample(2, correction=False), plain)
    assert not np.allclose(corrected, plain, rtol=0, atol=1e-5)
    # Elsewhere it stays off by itself, and asking for it is refused with the reason.
    ddpm_plain = run_solver(network, x, ddpm(bundle.schedule, ROWS), noise=seeded_noise(0))
    check_images(bundle.sample(2, sampler="ddpm"), ddpm_plain)
    others: list[dict[str, Any]] = [{"eta": 0.5}, {"sampler": "ddpm"}, {"sampler": "pndm", "steps": 5}]
    for other in others:
        assert bundle.correction_for(bundle.plan(**other)) is None
        with pytest.raises(InputError, match="it was fitted for ddim, 10 steps, eta 0, not for"):
            bundle.sample(2, correction=True, **other)
    with pytest.raises(InputError, match="at guidance 1, not 4: guidance multiplies the error"):
        bundle.sample(2, correction=True, guidance=4.0)
    with pytest.raises(InputError, match="at guidance 1, not 4") as caught:
        bundle.sample(2, guidance=4.0)
    assert "--no-correction" in (caught.value.hint or "")
    with pytest.raises(InputError, match="this bundle has none"):
        open_bundle(make_bundle(name="other")[0]).sample(2, correction=True)


@pytest.mark.parametrize("wish", [None, True])
def test_another_number_of_steps_is_interpolated_with_a_warning(make_bundle: Make, wish: bool | None) -> None:
    bundle = open_bundle(make_bundle(correction=True)[0])
    assert bundle.correction is not None
    twenty = bundle.plan(steps=20)
    steps = twenty.solver(bundle.schedule).steps
    with pytest.warns(InterpolatedCorrection, match="tables of 10 steps are interpolated for 20"):
        table = bundle.correction.for_deployment(twenty, steps)
    x = initial_noise(0, (2, 1, 8, 8))
    with pytest.warns(InterpolatedCorrection):
        found = bundle.sample(2, steps=20, correction=wish)
    check_images(found, sample(bundle.denoiser(), x, bundle.schedule, twenty, correction=table))
    with pytest.raises(AssertionError):
        check_images(found, bundle.sample(2, steps=20, correction=False))


@pytest.mark.parametrize("sampler", ["euler", "heun", "pndm", "dpmpp-2m-sde", "lcm", "euler-ancestral"])
def test_every_sampler_runs_on_a_bundle(make_bundle: Make, denoiser_onnx: Callable[..., bytes], sampler: str) -> None:
    """With a float timestep, as the usual spacing of Euler and Heun needs it."""
    bundle = open_bundle(make_bundle(model=denoiser_onnx("float[B]"), sampler=sampler)[0])
    plan = Deployment.of(bundle.schedule, sampler, 10)
    x = initial_noise(3, (3, 1, 8, 8))
    wanted = sample(bundle.denoiser(), x, bundle.schedule, plan, noise=seeded_noise(3))
    calls: list[tuple[int, int]] = []
    found = bundle.sample(3, seed=3, batch=2, progress=lambda *told: calls.append(told))
    check_images(found / np.abs(wanted).max(), wanted / np.abs(wanted).max())
    assert calls[-1] == (2 * len(plan.calls),) * 2
    with pytest.raises(AssertionError):
        check_images(found / np.abs(wanted).max(), bundle.sample(3, seed=3, steps=9) / np.abs(wanted).max())


def test_an_integer_timestep_refuses_a_sampler_between(make_bundle: Make) -> None:
    bundle = open_bundle(make_bundle()[0])
    with pytest.raises(InputError, match="lies between two training timesteps"):
        bundle.sample(1, sampler="heun", steps=9)
    leading = Schedule.from_config({**bundle.schedule.config, "timestep_spacing": "leading"})
    assert Deployment.of(leading, "heun", 9).whole


def test_steps_without_rows_are_refused_before_the_first_call(make_bundle: Make) -> None:
    bundle = open_bundle(make_bundle(deployed=ROWS)[0])
    calls: list[int] = []
    assert bundle.sample(1, steps=5).shape == (1, 1, 8, 8)
    with pytest.raises(TimestepNotDeployed, match="20 steps of ddim call timestep 950") as caught:
        bundle.sample(1, steps=20, progress=lambda done, total: calls.append(done))
    assert "1, 2, 5, 10" in str(caught.value)
    assert not calls


@pytest.mark.parametrize(("n", "batch"), [(0, 1), (1, 0)])
def test_nothing_to_sample(make_bundle: Make, n: int, batch: int) -> None:
    with pytest.raises(InputError, match="at least one"):
        open_bundle(make_bundle()[0]).sample(n, batch=batch)


def test_digest_leaves_out_times_and_nothing_else(make_bundle: Make) -> None:
    folder, manifest = make_bundle()
    slower = json.loads(json.dumps(manifest))
    slower["history"][0].update(seconds=99.0, peak_memory_mb=1)
    assert manifest_digest(slower) == manifest["digest"]
    slower["history"][0]["pass"] = "other"
    assert manifest_digest(slower) != manifest["digest"]
    assert make_bundle(name="again")[1]["digest"] == manifest["digest"]
    assert seal_bundle(folder, Manifest.from_json(manifest, "here")).to_json() == manifest


def test_changed_and_missing_files(make_bundle: Make) -> None:
    folder, _ = make_bundle(correction=True)
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="a file was changed") as caught:
        open_bundle(folder)
    assert caught.value.where == str(folder / MODEL)
    open_bundle(folder, verify=False)
    (folder / MODEL).write_bytes(data + b"x")
    with pytest.raises(BundleError, match="a file was changed"):
        open_bundle(folder, verify=False)
    (folder / MODEL).write_bytes(data)
    (folder / CORRECTION).unlink()
    with pytest.raises(BundleError, match="is missing") as caught:
        open_bundle(folder, verify=False)
    assert caught.value.where == str(folder / CORRECTION)


def test_folders_that_are_not_bundles(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        open_bundle(tmp_path / "missing")
    with pytest.raises(BundleError, match=r"there is no mezzotint\.json"):
        open_bundle(tmp_path)
    for text, message in (("{", "not readable JSON"), ("[]", "does not state its format"), ("{}", "does not state")):
        (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
        with pytest.raises(BundleError, match=message):
            open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "has format 1, this version of Mezzotint reads 2 and 3"),
        ({"format": 4}, "has format 4, this version of Mezzotint reads 2 and 3"),
        ({"signature": None}, "`signature` is incomplete or inconsistent"),
        ({"signature": {"sample": "x"}}, "`signature` is incomplete or inconsistent"),
        ({"deployment": {"sampler": "ddim"}}, "`deployment` is incomplete or inconsistent"),
        ({"deployed_timesteps": 5}, "`deployed_timesteps` is incomplete or inconsistent"),
        ({"sample_shape": []}, "`sample_shape` is incomplete or inconsistent"),
        ({"sample_shape": [1, 8, 0]}, "`sample_shape` is incomplete or inconsistent"),
        ({"sample_shape": [1 << 24, 1 << 24]}, "`sample_shape` is incomplete or inconsistent"),
        ({"sample_shape": [1] * 8}, "`sample_shape` is incomplete or inconsistent"),
        (
            {"signature": {**Signature("x", "t", "y").to_json(), "channel_axis": 4}},
            "`sample_shape` has no channels along axis 4",
        ),
        (
            {"signature": {**Signature("x", "t", "y").to_json(), "channel_axis": True}},
            "`signature` is incomplete or inconsistent",
        ),
        *(
            ({"signature": {**Signature("x", "t", "y").to_json(), "labels": labels}}, "`signature` is incomplete")
            for labels in (5, [{"name": "l", "classes": 10}], [{"name": "l", "classes": 1 << 40, "null": 10}])
        ),
        ({"quantizers": {}}, "`quantizers` is {}, not a list"),
        ({"kernels": {"integer": 1}}, r"the manifest has no `kernels\.float`"),
        ({"kernels": {"integer": True}}, r"`kernels\.integer` is True, not an integer"),
        ({"history": [{"pass": "one"}]}, r"the manifest has no `history\[0\]\.options`"),
        ({"islands": {"conv": 1}}, r"`islands\.conv` is 1, not a text"),
        ({"islnads": {}}, "a key that this version of Mezzotint does not know: `islnads`"),
        ({"files": None}, "`files` is None, not an object"),
        ({"files": {}}, "does not list unet/model.onnx"),
        ({"files": {"../secret": {"sha256": "", "bytes": 0}}}, "outside the bundle"),
        ({"files": {MODEL: {}}}, r"the manifest has no `files\.unet/model\.onnx\.sha256`"),
    ],
)
def test_manifests_that_do_not_add_up(make_bundle: Make, change: dict[str, Any], message: str) -> None:
    folder, manifest = make_bundle()
    changed = {**manifest, **change}
    (folder / MANIFEST).write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(BundleError, match="manifest was changed" if "format" not in change else message):
        open_bundle(folder)
    changed["digest"] = manifest_digest(changed)
    (folder / MANIFEST).write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(folder)
    assert str(folder) in str(caught.value.where)


def test_a_missing_key(make_bundle: Make) -> None:
    folder, manifest = make_bundle()
    del manifest["deployed_timesteps"]
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="the manifest has no `deployed_timesteps`") as caught:
        open_bundle(folder)
    assert caught.value.where == str(folder / MANIFEST)
    assert "compile the model again" in (caught.value.hint or "")


def test_a_bundle_in_a_notebook(make_bundle: Make) -> None:
    folder, _ = make_bundle(correction=True)
    assert repr(open_bundle(folder)).splitlines() == [
        f"Bundle {folder}",
        "  recipe     test",
        "  deployment ddim, 10 steps, eta 0",
        "  sample     1 x 8 x 8",
        f"  size       {(folder / MODEL).stat().st_size / 1e6:.2f} MB",
        "  kernels    0 of 1 integer",
        "  islands    0",
        "  correction yes",
    ]
