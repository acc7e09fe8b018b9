"""Bundles in the pipelines of transformers: the latents of the network that they were made from, or a reason.

The pipelines are those of tools/tiny_pipelines.py, of which docs/models.md shows all. Prompts are given as embeddings.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint import Bundle, compile_model
from mezzotint.diffusers import attach, stand_in
from mezzotint.runtime.compare import psnr_db
from mezzotint.runtime.errors import HalfPipeline, InputError, TimestepNotDeployed
from tools.measure_pipelines import PIPELINE_RESULTS
from tools.tiny_pipeline import STEPS, TinyPipeline
from tools.tiny_pipelines import TINY_PIPELINES

TOLERANCE = 1e-4  # of the largest latent; 1e-6 was the largest difference seen
NEAR_DB = 30.0  # of w8a8 beside float on random weights after four steps
SD3, FLUX, PIXART = "StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline"


@dataclass(frozen=True)
class Made:
    """A pipeline with its own network, the float bundle made from that, and the W8A8 one."""

    tiny: TinyPipeline
    network: Any
    bundle: Bundle
    quantized: Bundle

    def latents(self, bundle: Bundle | None = None, **changes: Any) -> np.ndarray[Any, Any]:
        """Return what the pipeline draws, with a bundle or its own network."""
        pipe = self.pipe(bundle)
        call = {**self.tiny.call(), **changes}
        return pipe(generator=torch.Generator().manual_seed(1), **call).images.numpy()  # type: ignore[no-any-return]

    def pipe(self, bundle: Bundle | None = None) -> Any:
        pipe = self.tiny.build(self.network)
        return pipe if bundle is None else attach(pipe, bundle, threads=1)


def made_in(folder: Path, name: str) -> Made:
    tiny = TINY_PIPELINES[name]
    network: Any = tiny.tiny.build()
    options: dict[str, Any] = {
        "scheduler": tiny.schedule(),
        "conditions": tiny.tiny.conditions(4),
        "steps": STEPS,
        "sampler": tiny.sampler,
        "threads": 1,
        "calibration_samples": 4,
        "acceptance_seconds": 1,
    }
    exported = folder / "exported" / "model.onnx"
    size = tiny.tiny.size
    bundle = compile_model(network, folder / "float", recipe="float", size=size, export=exported, **options)
    network.save_config(exported.parent)
    size, axis = bundle.signature.sides(bundle.sample_shape), bundle.signature.channel_axis
    quantized = compile_model(
        exported.parent, folder / "w8a8", recipe="w8a8", size=size, channel_axis=axis if axis > 1 else None, **options
    )
    return Made(tiny, network, bundle, quantized)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    known: dict[str, Made] = {}

    def find(name: str) -> Made:
        if name not in known:
            known[name] = made_in(tmp_path_factory.mktemp(name), name)
        return known[name]

    yield find


@pytest.mark.parametrize("name", [SD3, FLUX, PIXART])
def test_the_latents_are_those_of_the_network(made: Callable[[str], Made], name: str) -> None:
    """Float in tolerance, W8A8 near, on integer kernels; a prediction off by one per cent shows."""
    one = made(name)
    want = one.latents()
    peak = float(np.abs(want).max())

    got, near = one.latents(one.bundle), one.latents(one.quantized)

    assert np.abs(got - want).max() < TOLERANCE * peak
    assert not np.array_equal(near, got)
    assert psnr_db(want, near, peak=float(np.sqrt((want**2).mean()))).min() > NEAR_DB
    kernels = one.quantized.manifest.kernels
    assert kernels.integer > kernels.floating
    pipe = one.pipe(one.bundle)
    exact = pipe.transformer.denoiser
    pipe.transformer.denoiser = lambda x, t, **given: np.float32(1.01) * exact(x, t, **given)
    call = one.tiny.call()
    wrong = pipe(generator=torch.Generator().manual_seed(1), **call).images.numpy()
    assert np.abs(wrong - want).max() > TOLERANCE * peak


@pytest.mark.parametrize(("name", "tokens"), [(SD3, 9), (FLUX, 3), (PIXART, 13)])
def test_prompts_of_another_length_are_followed(made: Callable[[str], Made], name: str, tokens: int) -> None:
    """The bundles were calibrated with 5 tokens; W8A8 loses no more with others."""
    one = made(name)
    known, generator = one.tiny.call(), torch.Generator().manual_seed(5)
    changes: dict[str, Any] = {}
    for key, value in known.items():
        if key.endswith("prompt_embeds") and value.ndim == 3:
            changes[key] = torch.randn(1, tokens, value.shape[2], generator=generator)
        elif key.endswith("mask"):
            changes[key] = torch.tensor([[1] * (tokens - 1) + [0]])
    want = one.latents(**changes)

    got, near = one.latents(one.bundle, **changes), one.latents(one.quantized, **changes)

    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()
    assert psnr_db(want, near, peak=float(np.sqrt((want**2).mean()))).min() > NEAR_DB
    assert np.abs(want - one.latents()).max() > TOLERANCE * np.abs(want).max()
    assert one.bundle.manifest.calibration.sizes == one.quantized.manifest.calibration.sizes == {"tokens": 5}
    assert "calibration, which had tokens 5" in (one.bundle.path / "README.md").read_text()


@pytest.mark.parametrize(("name", "dtype"), [(SD3, torch.bfloat16), (FLUX, torch.bfloat16), (FLUX, torch.float16)])
def test_a_half_pipeline_is_taken_and_told_once(made: Callable[[str], Made], name: str, dtype: torch.dtype) -> None:
    """Flux divides its timestep in the pipeline's type: the row of the tables is the nearest one."""
    one = made(name)
    want = one.latents()
    pipe = one.tiny.build(copy.deepcopy(one.network).to(dtype))
    call = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in one.tiny.call().items()}

    with pytest.warns(HalfPipeline, match=f"the pipeline is in {dtype}") as caught:
        attach(pipe, one.bundle, threads=1)
        got = pipe(generator=torch.Generator().manual_seed(1), **call).images

    assert len([w for w in caught if w.category is HalfPipeline]) == 1
    assert got.dtype is dtype and pipe.transformer.dtype is dtype
    native = one.tiny.build(copy.deepcopy(one.network).to(dtype))
    theirs = native(generator=torch.Generator().manual_seed(1), **call).images.float()
    apart = float((theirs - got.float()).abs().max())
    assert apart < 0.05 * np.abs(want).max(), "noise in half precision differs from noise in float32"


def test_the_prediction_must_fit_the_type(made: Callable[[str], Made]) -> None:
    one = made(SD3)
    network = stand_in(one.bundle, threads=1)
    exact = network.denoiser
    network.denoiser = lambda x, t, **given: np.float32(1e6) * exact(x, t, **given)  # type: ignore[assignment]
    pipe = one.tiny.build(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HalfPipeline)
        with pytest.raises(InputError, match=r"beyond the range of torch\.float16"):
            call = one.tiny.call()
            halves = {k: v.half() if torch.is_tensor(v) else v for k, v in call.items()}
            pipe(generator=torch.Generator().manual_seed(1), **halves)


REFUSED = [
    (SD3, {"joint_attention_kwargs": {"scale": 0.5}}, r"cannot use joint_attention_kwargs\['scale'\]", "fuse a LoRA"),
    (SD3, {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}, "cannot use skip_layers", "original"),
    (
        FLUX,
        {"height": 32, "width": 128},
        "img_ids has other values than it had when the bundle was exported",
        "constant",
    ),
    (FLUX, {"height": 32}, r"img_ids has the shape \[8, 3\], and had \[16, 3\]", "constant"),
    (FLUX, {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1)]}}, "ip_adapter", "IP adapters"),
]


@pytest.mark.parametrize(("name", "changes", "complaint", "hint"), REFUSED)
def test_a_call_that_the_graph_cannot_follow_is_refused(
    made: Callable[[str], Made], name: str, changes: dict[str, Any], complaint: str, hint: str
) -> None:
    one = made(name)
    with pytest.raises(InputError, match=complaint) as caught:
        one.latents(one.bundle, **changes)
    assert hint in (caught.value.hint or "")


def test_a_pipeline_with_timesteps_of_its_own_is_told_the_sigmas(made: Callable[[str], Made]) -> None:
    one = made(FLUX)
    with pytest.raises(TimestepNotDeployed, match="has no row") as caught:
        one.latents(one.bundle, sigmas=[1.0, 0.9, 0.5, 0.3])

    listed = (caught.value.hint or "").partition("sigmas=[")[2].partition("]")[0]
    sigmas = [float(text) for text in listed.split(", ")]
    got = one.latents(one.bundle, sigmas=sigmas)
    assert np.abs(got - one.latents(sigmas=sigmas)).max() < TOLERANCE * np.abs(got).max()


class TestCall:
    """The stand-in beside the network, called like it."""

    def test_its_answers_are_those_of_the_network(self, made: Callable[[str], Made]) -> None:
        one = made(PIXART)
        network = stand_in(one.bundle, threads=1)
        generator = torch.Generator().manual_seed(0)
        given: dict[str, Any] = {
            "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
            "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
            "timestep": torch.tensor([int(one.bundle.deployment.calls[0])] * 2),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        masks = [None, torch.ones(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])]
        for mask in masks:
            with torch.no_grad():
                want = one.network(**given, encoder_attention_mask=mask)
            got = network(**given, encoder_attention_mask=mask)
            assert type(got) is type(want)
            # A DiT with learned variances is compiled without them.
            assert torch.allclose(
                got.sample, want.sample[:, :4], rtol=0, atol=TOLERANCE * float(want.sample.abs().max())
            )
        assert not torch.equal(network(**given, encoder_attention_mask=masks[2]).sample, network(**given).sample)

    def test_a_mask_that_the_graph_has_no_input_for(self, made: Callable[[str], Made]) -> None:
        network = stand_in(made(PIXART).bundle, threads=1)
        sample, prompt = torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 12)
        time = torch.tensor([int(network.bundle.deployment.calls[0])])
        call = {"encoder_hidden_states": prompt, "timestep": time, "return_dict": False}

        same = network(sample, **call, attention_mask=torch.ones(1, 16))[0]

        assert torch.equal(same, network(sample, **call)[0])
        with pytest.raises(InputError, match="cannot use attention_mask") as caught:
            network(sample, **call, attention_mask=torch.tensor([[1.0] * 15 + [0.0]]))
        assert "not all ones" in (caught.value.hint or "")

    def test_arguments_of_no_forward(self, made: Callable[[str], Made]) -> None:
        network = stand_in(made(SD3).bundle, threads=1)
        with pytest.raises(InputError, match=r"a SD3Transformer2DModel cannot be called like this: .*'depth'"):
            network(torch.zeros(1, 4, 8, 8), depth=3)
        with pytest.raises(InputError, match="gives no timestep"):
            network(torch.zeros(1, 4, 8, 8), encoder_hidden_states=torch.zeros(1, 5, 16))

    def test_a_constant_that_is_left_out(self, made: Callable[[str], Made]) -> None:
        network = stand_in(made(FLUX).bundle, threads=1)
        with pytest.raises(InputError, match="the call leaves out img_ids"):
            network(torch.zeros(1, 16, 16), timestep=torch.ones(1), txt_ids=torch.zeros(5, 3))


def test_the_page_of_models_has_what_pipelines_showed() -> None:
    """A bundle of W8A8 is near where the network is a transformer; guidance multiplies what random U-Nets lose."""
    kept = json.loads(PIPELINE_RESULTS.read_text(encoding="utf-8"))

    assert {SD3, FLUX, PIXART, "SanaPipeline", "WanPipeline"} <= kept.keys() <= TINY_PIPELINES.keys()
    for name, found in kept.items():
        assert found["network"] == TINY_PIPELINES[name].network
        assert found["float"] < TOLERANCE
        assert found["int8_db"] > NEAR_DB or "Transformer" not in found["network"]


def test_the_card_has_the_loop_of_the_networks_own_call(
    made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graph of Flux holds its ids as constants, which a loop would have to give: its card shows the pipeline."""
    one = made(SD3).bundle
    programs = [part.split("```")[0] for part in (one.path / "README.md").read_text().split("```python")[1:]]
    [loop] = [program for program in programs if "scheduler.step" in program]
    assert "hidden_states=x, timestep=t.expand(1), **conditional" in loop
    monkeypatch.chdir(one.path)
    exec(loop, {"__name__": "__main__"})  # our own card's program
    assert capsys.readouterr().out.startswith("torch.Size([1, ")
    card = (made(FLUX).bundle.path / "README.md").read_text()
    assert "scheduler.step" not in card and "attach(pipe" in card
