"""The model card: what it says, and that every program it shows runs as it is printed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mezzotint import Bundle, compile_model, mix_bundles, open_bundle
from mezzotint.compiler.bundle.card import card_text
from mezzotint.compiler.bundle.card_code import SCHEDULERS
from mezzotint.io.hub import card_fields, front_matter
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import load_recipe
from mezzotint.recard import rewrite_card
from mezzotint.runtime.bundle.bundle import MODEL
from mezzotint.runtime.diffusers.scheduler import sampler_of
from mezzotint.runtime.errors import BundleError, InputError
from mezzotint.runtime.sampling.deployment import SAMPLERS
from mezzotint.runtime.sampling.samplers import initial_noise
from tests.helpers import pipelines
from tests.helpers.full_disk import full_disk
from tests.helpers.manifests import changed_manifest
from tests.helpers.models import SMALL, THREADS, Cli, Compiled, hand_written, write
from tests.mezzotint.cli.test_app import contents, refused

ROOT = Path(__file__).parents[2]
EVAL = {
    "metrics": {
        "psnr_db": {"value": 31.25, "low": 30.5, "high": 32.0, "unit": "dB"},
        "agreement": 0.875,
        "frechet": None,
    },
    "pictures": 64,
}
BENCH = {
    "call_ms": {"median": 12.5, "minimum": 11.0},
    "float_call_ms": {"median": 25.0, "minimum": 24.0},
    "speedup": 2.0,
    "batch": 1,
    "threads": 2,
    "onnxruntime": "1.31.1",
}


def text(bundle: Bundle) -> str:
    return (bundle.path / "README.md").read_text(encoding="utf-8")


def blocks(words: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", words, re.DOTALL | re.MULTILINE)


def front(words: str) -> dict[str, Any]:
    fields = yaml.safe_load(words.split("---\n")[1])
    assert isinstance(fields, dict)
    return fields


def run(program: str, folder: Path, **given: Any) -> str:
    """A program's output, run in that folder, with nothing but what is `given` known to it."""
    said = io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said):
            exec(program, {"__name__": "__main__", **given})  # our own card's program
    finally:
        os.chdir(before)
    return said.getvalue()


@pytest.fixture(scope="module")
def digits(exported_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The embedded model, in few steps."""
    options: dict[str, Any] = {**SMALL, "scheduler": None, "steps": 2, "size": (32, 32)}
    return compile_model(exported_digits, tmp_path_factory.mktemp("digits") / "b", recipe="w8a8", **options)


@pytest.fixture(scope="module")
def guided(conditional: Compiled, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Any]:
    """A conditional UNet with guidance and a noise correction, and a pipeline of the same network."""
    folder = tmp_path_factory.mktemp("guided")
    made = pipelines.stable_diffusion(folder)
    parts = {**made.components, "unet": conditional.module, "text_encoder": pipelines.text_encoder(16)}
    pipe = pipelines.quiet(type(made)(**parts, requires_safety_checker=False))
    pipe.scheduler.save_config(folder / "scheduler")
    shutil.copyfile(conditional.exported, folder / "model.onnx")
    conditional.module.save_config(folder)
    given: dict[str, Any] = {"conditions": "random", "unconditional": "random", "guidance": 2.0, "eta": 0.5}
    options = {**SMALL, "scheduler": folder / "scheduler", "steps": 2, "size": (8, 8), **given}
    return compile_model(folder / "model.onnx", folder / "b", recipe="ptqd-w8a8", **options), pipe


@pytest.fixture
def bundle(hand: Compiled, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hand.bundle.path, tmp_path / "bundle"))


class TestPrograms:
    """They run in the bundle's folder, and compute what the bundle computes."""

    def test_of_the_digits(self, digits: Bundle) -> None:
        plain, own, loop, pipeline = blocks(text(digits), "python")

        assert run(plain, digits.path) == "(1, 1, 32, 32) float32\n"
        assert run(own, digits.path) == "(2, 1, 32, 32)\n"
        assert "correct" not in loop
        assert run(loop, digits.path) == "torch.Size([1, 1, 32, 32])\n"
        assert "attach(pipe" in pipeline

    def test_of_a_conditional_network_with_guidance(self, guided: tuple[Bundle, Any]) -> None:
        bundle, pipe = guided
        plain, own, loop, pipeline = blocks(text(bundle), "python")

        assert run(plain, bundle.path) == "(1, 4, 8, 8) float32\n"
        assert "unconditional=unconditional" in own
        assert run(own, bundle.path) == "(2, 4, 8, 8)\n"
        assert "2.0 * (prediction - without)" in loop
        assert 'correct(scheduler, ".", guidance_scale=2.0)' in loop
        assert "eta=0.5" in loop
        assert run(loop, bundle.path) == "torch.Size([1, 4, 8, 8])\n"
        run(pipeline, bundle.path, pipe=pipe)
        assert "called with `num_inference_steps=2, guidance_scale=2.0, eta=0.5`" in text(bundle)
        assert pipe.unet.bundle.manifest.digest == bundle.manifest.digest
        assert pipe("a cat", num_inference_steps=2, guidance_scale=2.0, eta=0.5, output_type="np").images.shape == (
            1,
            16,
            16,
            3,
        )

    def test_the_loop_draws_what_the_bundle_draws(self, digits: Bundle) -> None:
        """Its last latents, from the same noise."""
        loop = blocks(text(digits), "python")[2]
        start = "x = torch.randn(1, 1, 32, 32, generator=generator)"
        assert start in loop
        x = initial_noise(0, (1, 1, 32, 32))
        kept: dict[str, Any] = {"noise": torch.from_numpy(x)}
        given = loop.replace(start, "x = noise").replace("print(x.shape)", "kept['x'] = x.numpy()")

        run(given, digits.path, kept=kept, **kept)

        want = digits.sample(1, seed=0)
        np.testing.assert_allclose(kept["x"], want, atol=2e-2)  # a last bit may turn a quantizer
        assert np.abs(x - want).max() > 0.5, "the twin: the loop did something"

    def test_a_program_that_does_not_run_is_noticed(self, digits: Bundle) -> None:
        plain = blocks(text(digits), "python")[0]

        with pytest.raises(ValueError, match="timestep"):
            run(plain.replace('"timestep": ', '"time": '), digits.path)

    def test_every_sampler_has_a_scheduler(self) -> None:
        import diffusers

        assert set(SCHEDULERS) == set(SAMPLERS)
        for sampler, (name, more) in SCHEDULERS.items():
            options = dict([more.removeprefix(", ").replace('"', "").split("=")]) if more else {}
            assert sampler_of(getattr(diffusers, name)(**options)) == sampler

    def test_what_floats_and_what_counts(self, digits: Bundle) -> None:
        """Inputs of other types and ranks than the usual ones, as the graph declares them."""
        inputs = {
            "sample": {"dtype": "float32", "shape": [2, 1, 8, 8]},
            "timestep": {"dtype": "float32", "shape": []},
            "labels": {"dtype": "int64", "shape": [2]},
            "text": {"dtype": "float16", "shape": [2, None, 6]},
        }
        signature = {**digits.manifest.signature.to_json(), "conditions": ["labels", "text"]}
        changes = {"inputs": inputs, "signature": signature, "sample_shape": [1, 8, 8]}
        words = card_text(changed_manifest(digits.manifest, **changes), digits.path)

        assert '"labels": np.zeros((2,), np.int64)' in words
        assert '"text": rng.standard_normal((2, 77, 6)).astype(np.float16)' in words
        assert '"timestep": np.array(0, np.float32)' in words
        assert "The batch size 2 is written into the graph" in words


class TestFacts:
    """What stands in it is what the manifest says."""

    @pytest.mark.parametrize("name", ["w8a8", "w4a8", "w8a8-constant"])
    def test_the_recipe_reads_back(self, hand: Compiled, tmp_path: Path, name: str) -> None:
        made = compile_model(hand.exported, tmp_path / "b", recipe=name, **SMALL)
        [block] = blocks(text(made), "yaml")
        (tmp_path / "r.yaml").write_text(block)

        assert load_recipe(str(tmp_path / "r.yaml")) == RECIPES[name]
        assert made.manifest.target == RECIPES[name].target
        assert ("bits on average" in text(made)) == bool(made.manifest.bits)
        assert run(blocks(text(made), "python")[0], made.path) == "(1, 1, 8, 8) float32\n"

    def test_the_same_compilation_writes_the_same_card(self, hand: Compiled, tmp_path: Path) -> None:
        again = compile_model(hand.exported, tmp_path / "b", recipe="w8a8", **SMALL)
        other = compile_model(hand.exported, tmp_path / "c", recipe="w8a8", **{**SMALL, "steps": 2})

        assert text(again) == text(hand.bundle)
        assert text(other) != text(hand.bundle)

    def test_what_was_measured_while_compiling(self, guided: tuple[Bundle, Any]) -> None:
        bundle, _ = guided
        words = text(bundle)

        assert bundle.manifest.noise["summary"] in words
        assert "valid for ddim, 2 steps, eta 0.5, guidance 2 only" in words
        assert f"tables for {len(bundle.deployed_timesteps or ())} timesteps" in words
        assert (bundle.manifest.source.weights_sha256 or "none") in words
        for name, why in bundle.manifest.islands.items():
            assert f"- `{name}`: {why}" in words
        for file in ("unet/config.json", "correction.safetensors", "noise.png", MODEL, "passes"):
            assert f"- `{file}`: " in words

    def test_nothing_is_told_that_is_not_there(self, hand: Compiled) -> None:
        words = text(hand.bundle)

        assert len(blocks(words, "python")) == 2
        for absent in ("diffusers", "correction", "How fast", "None", "base_model", "pipeline_tag"):
            assert absent not in words
        assert "SQNR" in words and "Quantization noise is undone" not in words

    def test_the_fields_in_front(self, digits: Bundle, guided: tuple[Bundle, Any], hand: Compiled) -> None:
        assert front(text(digits)) == {
            "license": "apache-2.0",  # as the model's own card says
            "library_name": "mezzotint",
            "pipeline_tag": "unconditional-image-generation",
            "tags": ["mezzotint", "onnx", "onnxruntime", "diffusers", "quantized"],
        }
        assert "pipeline_tag" not in front(text(guided[0]))
        assert front(text(guided[0]))["license"] == "unknown"
        assert "diffusers" not in front(text(hand.bundle))["tags"]

    def test_the_folder_is_laid_out_as_diffusers_has_it(self, digits: Bundle) -> None:
        """Its own loaders find the configurations where they look for them."""
        from diffusers import DDIMScheduler, UNet2DModel

        config = UNet2DModel.load_config(digits.path, subfolder="unet")
        network = UNet2DModel.from_config(config)
        scheduler = DDIMScheduler.from_pretrained(digits.path, subfolder="scheduler")

        known = digits.manifest.source.parameter_bytes  # the graph has some constants of its own
        assert 4 * sum(p.numel() for p in network.parameters()) == pytest.approx(known, rel=1e-4)
        assert scheduler.config.num_train_timesteps == digits.schedule.num_train_timesteps

    def test_a_mixed_bundle(self, hand: Compiled, tmp_path: Path) -> None:
        exact = compile_model(hand.exported, tmp_path / "f", recipe="float", **SMALL)
        options: dict[str, Any] = {"costs": {"w8a8": 0.5, "float": 1.0}, "budget": 0.75, "pictures": 2}
        bundles = {"w8a8": hand.bundle, "float": exact}
        mixed = mix_bundles(bundles, tmp_path / "m", reference=hand.exported, threads=THREADS, **options)
        words = text(mixed)

        assert len(blocks(words, "yaml")) == 2
        assert "The recipe of `float`" in words
        assert run(blocks(words, "python")[0], mixed.path) == "(1, 1, 8, 8) float32\n"
        assert run(blocks(words, "python")[1], mixed.path) == "(2, 1, 8, 8)\n"


class TestLicence:
    """Given, or the model's own, or unknown; never made up."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        (tmp_path / "pipeline" / "unet").mkdir(parents=True)
        write(hand_written(), tmp_path / "pipeline" / "unet" / "model.onnx")
        return tmp_path / "pipeline"

    def test_that_of_the_models_own_card(self, cli: Cli, model: Path, tmp_path: Path) -> None:
        (model / "README.md").write_text("---\nlicense: openrail\npipeline_tag: text-to-image\ntags: [a]\n---\n# A\n")
        words = ["compile", "--scheduler", "ddpm-linear", "--steps", "2", "--calibration-samples", "2"]

        assert cli(*words, model, "-o", tmp_path / "b").code == 0
        assert cli(*words, model / "unet", "-o", tmp_path / "c", "--license", "mit").code == 0
        own, given = (front(text(open_bundle(tmp_path / name))) for name in "bc")
        assert (own["license"], own["pipeline_tag"]) == ("openrail", "text-to-image")
        assert given["license"] == "mit"
        assert "that of the float model, as its card says" in text(open_bundle(tmp_path / "b"))
        refused(cli(*words, model, "-o", tmp_path / "d", "--license", "My License"), "not an identifier of a licence")

    @pytest.mark.parametrize(
        "words",
        [
            "",
            "# no fields",
            "---\nlicense: [a]\n---\n",
            "---\n- a\n---\n",
            "---\nlicense: {\n---\n",
            "---\nlicense: mit\n",
        ],
    )
    def test_a_card_that_tells_nothing(self, model: Path, words: str) -> None:
        (model / "README.md").write_text(words)

        assert card_fields(model) == {}

    def test_fields_that_others_write(self, model: Path) -> None:
        fields = "---\r\nlicense: other\r\nlicense_name: own\r\nlicense_link: LICENSE\r\n---\r\n"
        (model / "README.md").write_bytes(fields.encode())

        assert front_matter(model / "README.md")["license"] == "other"
        assert card_fields(model / "unet")["license_name"] == "own"
        assert card_fields(model, "mit") == {"license": "mit", "license_from": "given"}
        assert card_fields(model / "unet" / "model.onnx") == {}, "what lies around a file need not belong to it"
        (model / "README.md").write_bytes(b"\xff\xfe")
        assert card_fields(model) == {}


class TestLater:
    """`mezzotint card`: figures that come after the compilation."""

    def test_figures_get_in_and_stay(self, cli: Cli, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "e.json").write_text(json.dumps(EVAL))
        (tmp_path / "b.json").write_text(json.dumps(BENCH))
        before = open_bundle(bundle).manifest

        first = cli("card", bundle, "--eval", tmp_path / "e.json", "--json")
        then = cli("card", bundle, "--bench", tmp_path / "b.json", "--base-model", "us/digits", "--license", "mit")

        printed = json.loads(first.out)
        assert printed["digest before"] == before.digest != printed["digest"]
        assert then.code == 0, then.err
        words = text(open_bundle(bundle))
        assert "| psnr_db | 31.25 dB | 30.5 to 32 |" in words
        assert "| same class | 0.875 |  |" in words
        assert "| Frechet distance to the float images | no error |" in words
        assert "pictures 64" in words
        assert "takes 12.5 ms" in words
        assert "2.00 times as long" in words
        assert front(words)["base_model"] == "us/digits"
        assert front(words)["license"] == "mit"
        unchanged = {n: e for n, e in before.files.items() if n != "README.md"}
        after = open_bundle(bundle).manifest.files
        assert {n: e for n, e in after.items() if n != "README.md"} == unchanged

    def test_figures_as_eval_writes_them(self, bundle: Path, tmp_path: Path) -> None:
        """With the digest of the bundle, of before its card was written; with what was not measured, and the speed."""
        found = {
            "bundle": {"digest": open_bundle(bundle).manifest.digest},
            "reference": {"same_weights": False},
            "correction": True,
            "onnxruntime": "1.31.1",
            "metrics": {
                "psnr_db_mean": {"value": 31.25, "interval": [30.5, None], "why": None},
                "lpips_mean": {"value": None, "interval": None, "why": "lpips is not installed"},
            },
            "speed": {"call_ms": 5.0, "float_call_ms": 10.0, "ratio": {"value": 2.0}, "batch": 4, "threads": None},
        }
        (tmp_path / "e.json").write_text(json.dumps(found))

        rewrite_card(bundle, license="mit")
        words = text(rewrite_card(bundle, evaluation=tmp_path / "e.json"))

        assert "| PSNR, mean | 31.25 dB | 30.5 to no error |" in words
        assert "| LPIPS, mean | lpips is not installed |  |" in words
        assert "has other weights" in words
        assert "correction yes" in words
        assert "One call with batch 4 takes 5 ms (median), onnxruntime 1.31.1 with its own choice of threads" in words

    def test_without_anything_new_nothing_changes(self, cli: Cli, bundle: Path) -> None:
        before = contents(bundle)

        assert "nothing changed" in cli("card", bundle).out
        assert contents(bundle) == before
        assert [f.name for f in bundle.parent.iterdir()] == ["bundle"]
        assert all(f.stat().st_nlink == 1 for f in bundle.rglob("*") if f.is_file()), "onnx refuses linked weights"

    def test_the_bundle_that_was_copied_is_not_written_into(self, bundle: Path, tmp_path: Path) -> None:
        """Another folder may hold links to the same files: its card stays."""
        twin = tmp_path / "twin"
        shutil.copytree(bundle, twin, copy_function=os.link)
        before = contents(twin)

        rewrite_card(bundle, license="mit")
        assert contents(twin) == before
        assert contents(bundle) != before

    def test_a_bundle_from_before_there_were_inputs(self, bundle: Path) -> None:
        from mezzotint.runtime.bundle.bundle import seal_bundle

        words = text(open_bundle(bundle))
        seal_bundle(bundle, replace(open_bundle(bundle).manifest, inputs=None))

        assert text(rewrite_card(bundle)) == words

    @pytest.mark.parametrize(
        ("option", "content", "words"),
        [
            ("--eval", "{", ("not readable JSON",)),
            ("--eval", "{}", ("no figures of an evaluation", "mezzotint eval --json")),
            ("--eval", '{"metrics": {"a": "x"}}', ("'a' is no number: 'x'",)),
            ("--eval", '{"metrics": {"a": {"low": 1}}}', ("'a' has no `value`",)),
            ("--eval", '{"metrics": {"a": NaN}}', ("it has NaN as a number",)),
            ("--bench", '{"call_ms": 3}', ("no figures of a measurement of speed", "mezzotint bench --json")),
            ("--bench", '{"float_call_ms": null, "call_ms": {"median": 1}}', ("batch",)),
            ("--eval", '{"metrics": {"a": 1}, "bundle": {"digest": "abc"}}', ("figures are of another bundle, abc",)),
        ],
    )
    def test_other_files(
        self, cli: Cli, bundle: Path, tmp_path: Path, option: str, content: str, words: tuple[str, ...]
    ) -> None:
        (tmp_path / "x.json").write_text(content)
        before = contents(bundle)

        refused(cli("card", bundle, option, tmp_path / "x.json"), *words, "x.json")
        assert contents(bundle) == before

    def test_names_that_are_none(self, bundle: Path) -> None:
        before = contents(bundle)

        with pytest.raises(InputError, match="not a model of the hub: 'a/b/c'"):
            rewrite_card(bundle, base_model="a/b/c")
        with pytest.raises(InputError, match="not an identifier of a licence: 'MIT License'"):
            rewrite_card(bundle, license="MIT License")
        assert contents(bundle) == before

    def test_a_changed_bundle_is_not_sealed_again(self, bundle: Path) -> None:
        data = bytearray((bundle / MODEL).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / MODEL).write_bytes(data)

        with pytest.raises(BundleError, match="changed after the bundle was sealed"):
            rewrite_card(bundle)

    def test_a_disk_that_is_full(self, bundle: Path) -> None:
        before = contents(bundle)
        full_disk([0, 1000, len(before["README.md"]) + 1000], ["card", bundle, "--license", "mit"])

        assert contents(bundle) == before
        assert [f.name for f in bundle.parent.iterdir()] == ["bundle"]
        assert rewrite_card(bundle, license="mit").manifest.card["license"] == "mit", "the twin: with space it works"
