"""Prompts as conditions: those of the pipeline's own encoders, or one error for what cannot be encoded."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from mezzotint.compiler.core.cache import Cache
from mezzotint.compiler.errors import ConditionError
from mezzotint.options import CalibrationOptions, CompileOptions, DeploymentOptions
from mezzotint.pipeline.watch import Recording, joined_rows
from mezzotint.prepared import prepare, with_prompts
from mezzotint.prompts.guidance import guidance_arguments, guidance_of_call, normalizes_guidance
from mezzotint.prompts.pipeline import prompt_pipeline
from mezzotint.prompts.rows import prompt_plan, prompt_rows
from mezzotint.prompts.texts import MOST_PROMPTS, read_prompts
from mezzotint.runtime.progress import silent
from tests.helpers.prompt_pipelines import prompt_pipeline_of

PROMPTS = ("a red fox", "two boats at dusk, calm water", "cat", "a door", "a letter that says hello")
NEGATIVE = "blurry, dull, out of focus"  # longer than the first prompt
Rows = dict[str, Any]
Halves = tuple[Rows, Rows]


def stable_diffusion(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    both = pipe.encode_prompt(text, "cpu", 1, True, negative)
    return {"encoder_hidden_states": both[0]}, {"encoder_hidden_states": both[1]}


def sdxl(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    found = pipe.encode_prompt(text, device="cpu", negative_prompt=negative)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(text))  # latents of 8, and an autoencoder of one level
    names = ("encoder_hidden_states", "text_embeds", "time_ids")
    halves = [dict(zip(names, (*found[i::2], ids), strict=True)) for i in range(2)]
    return halves[0], halves[1]


def sd3(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    found = pipe.encode_prompt(text, text, text, device="cpu", negative_prompt=negative)
    halves = [dict(zip(("encoder_hidden_states", "pooled_projections"), found[i::2], strict=True)) for i in range(2)]
    return halves[0], halves[1]


def flux(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    halves = []
    for half in (text, negative):
        prompt, pooled, _ = pipe.encode_prompt(half, device="cpu", max_sequence_length=512)
        halves.append({"encoder_hidden_states": prompt, "pooled_projections": pooled})
    guidance = {"guidance": torch.full((len(text),), 3.5)}  # FluxPipeline's own
    return {**halves[0], **guidance}, {**halves[1], **guidance}


def pixart(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    found = pipe.encode_prompt(text, True, negative, device="cpu", max_sequence_length=300)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return dict(zip(names, found[:2], strict=True)), dict(zip(names, found[2:], strict=True))


def wan(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    found = pipe.encode_prompt(text, negative, max_sequence_length=512, device="cpu")
    return {"encoder_hidden_states": found[0]}, {"encoder_hidden_states": found[1]}


def auraflow(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    found = pipe.encode_prompt(text, negative, device="cpu")
    return {"encoder_hidden_states": found[0]}, {"encoder_hidden_states": found[2]}


def ltx(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    found = pipe.encode_prompt(text, negative, device="cpu", max_sequence_length=128)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return dict(zip(names, found[:2], strict=True)), dict(zip(names, found[2:], strict=True))


def cogvideox(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    found = pipe.encode_prompt(text, negative, max_sequence_length=226, device="cpu")
    return {"encoder_hidden_states": found[0]}, {"encoder_hidden_states": found[1]}


def sana(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    """The pipeline puts an instruction in front of its prompts, and none in front of the negative one."""
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    length = {"device": "cpu", "max_sequence_length": 300}
    found = pipe.encode_prompt(text, True, negative, complex_human_instruction=instruction, **length)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return dict(zip(names, found[:2], strict=True)), dict(zip(names, found[2:], strict=True))


def chroma(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    """The mask covers the sixteen tokens of the image, too."""
    found = pipe.encode_prompt(text, negative, device="cpu")
    image = torch.ones(len(text), 16)
    halves = [
        {"encoder_hidden_states": found[i], "attention_mask": torch.cat([found[i + 2], image], dim=1)} for i in (0, 3)
    ]
    return halves[0], halves[1]


def lumina2(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    """The pipeline puts its system prompt in front of its prompts, and none in front of the negative one."""
    found = pipe.encode_prompt(text, True, negative, device="cpu")
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return dict(zip(names, found[:2], strict=True)), dict(zip(names, found[2:], strict=True))


def padded(name: str, rows: Any, lengths: list[int]) -> Rows:
    """Prompts of these lengths in 512 tokens, with a mask."""
    mask = (torch.arange(512) < torch.tensor(lengths)[:, None]).long()
    return {name: torch.nn.functional.pad(rows, (0, 0, 0, 512 - rows.shape[1])), f"{name}_mask": mask}


def qwen_image(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    halves = []
    for half in (text, negative):
        rows, mask = pipe.encode_prompt(half, device="cpu", max_sequence_length=512)
        lengths = [rows.shape[1]] * len(rows) if mask is None else mask.sum(dim=1).tolist()
        halves.append(padded("encoder_hidden_states", rows, lengths))
    return halves[0], halves[1]


def z_image(pipe: Any, text: list[str], negative: list[str]) -> Halves:
    halves = []
    for rows in pipe.encode_prompt(list(text), device="cpu", negative_prompt=list(negative)):
        stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        halves.append(padded("cap_feats", stacked, [len(row) for row in rows]))
    return halves[0], halves[1]


EXPECTED: dict[str, Callable[[Any, list[str], list[str]], Halves]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": sdxl,
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
    "PixArtSigmaPipeline": pixart,
    "WanPipeline": wan,
    "AuraFlowPipeline": auraflow,
    "LTXPipeline": ltx,
    "CogVideoXPipeline": cogvideox,
    "SanaPipeline": sana,
    "ChromaPipeline": chroma,
    "Lumina2Pipeline": lumina2,
    "QwenImagePipeline": qwen_image,
    "ZImagePipeline": z_image,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_conditions_are_those_of_the_pipelines_encoders(name: str, tmp_path: Path) -> None:
    """In both halves, over two batches, in the order of the prompts."""
    (tmp_path / "words").mkdir()
    pipe = prompt_pipeline_of(name, tmp_path / "words")
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(["", *PROMPTS, ""]), encoding="utf-8")
    plan = prompt_plan(tmp_path / "pipe", tmp_path / "prompts.txt", NEGATIVE, 5)

    got = prompt_rows(plan, guided=True, size=(8, 8))

    with torch.no_grad():
        want, without = EXPECTED[name](pipe, list(PROMPTS), [NEGATIVE] * len(PROMPTS))
    for half, expected, count in ((got.conditions, want, 5), (got.unconditional, without, 1)):
        assert half.keys() == expected.keys()
        for key, array in half.items():
            assert len(array) == count and array.dtype in (np.float32, np.int64)
            near = expected[key][:count].float().numpy()
            assert np.abs(array - near).max() <= 1e-5 * max(1.0, float(np.abs(near).max())), key
    rows = next(array for name, array in got.conditions.items() if name in ("encoder_hidden_states", "cap_feats"))
    assert len({row.tobytes() for row in rows}) == 5
    assert prompt_rows(plan, guided=False, size=(8, 8)).unconditional == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of Stable Diffusion."""
    root = tmp_path_factory.mktemp("prompts")
    prompt_pipeline_of("StableDiffusionPipeline", root).save_pretrained(root / "pipe")
    return root / "pipe"


def options(**calibration: Any) -> CompileOptions:
    return CompileOptions(
        deployment=DeploymentOptions(steps=3, guidance=5.0), calibration=CalibrationOptions(samples=3, **calibration)
    )


def test_a_compilation_encodes_as_many_prompts_as_it_has_samples(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(str(folder), tmp_path / "b", options(prompts="default", negative=NEGATIVE))
    assert prepared.conditions is None and prepared.prompts is not None, "nothing is encoded before torch is needed"

    found = with_prompts(prepared, Cache(tmp_path / "cache"), silent)

    assert found.conditions is not None and found.unconditional is not None and found.prompt_facts is not None
    assert found.conditions["encoder_hidden_states"].shape == (3, 77, 32)
    assert found.prompt_facts["count"] == 3
    assert found.sizes["encoder_hidden_states"] == (77, 32)
    entries = list((tmp_path / "cache").iterdir())
    assert [entry.name[:8] for entry in entries] == ["prompts-"]
    again = with_prompts(prepared, Cache(tmp_path / "cache"), _refuse)
    assert again.conditions is not None
    assert all(np.array_equal(found.conditions[k], again.conditions[k]) for k in found.conditions)


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [
        ("StableDiffusionPipeline", 3.0, {"guidance_scale": 3.0}),
        ("FluxPipeline", 1.0, {"true_cfg_scale": 1.0}),
        ("QwenImagePipeline", 4.0, {"true_cfg_scale": 4.0}),
        ("ZImagePipeline", 3.0, {"guidance_scale": 2.0}),
        ("ZImagePipeline", 1.0, {"guidance_scale": 0.0}),
    ],
)
def test_each_class_takes_the_scale_of_guidance_in_its_own_way(
    name: str, scale: float, expected: dict[str, float]
) -> None:
    kind = getattr(diffusers, name)
    assert guidance_arguments(kind, scale) == expected
    assert guidance_arguments(diffusers.SanaSprintPipeline, scale, embedded=True) == {}
    if "guidance_scale" in expected:
        pipe = object.__new__(kind)
        pipe._guidance_scale = expected["guidance_scale"]
        pipe.register_to_config()
        pipe.unet = SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=None))
        assert guidance_of_call(pipe) == scale
    assert normalizes_guidance(kind) == (name in ("FluxPipeline", "QwenImagePipeline"))
    assert normalizes_guidance(diffusers.Lumina2Pipeline)


def test_prompts_of_several_lengths_are_rows_of_several_groups() -> None:
    """Each prompt once, with its mask, in batches of at least two rows."""
    long, short = np.arange(12).reshape(2, 6), np.arange(8).reshape(2, 4)
    calls = [{"input_ids": ids, "attention_mask": ids > 1} for ids in (long, short, long[:1], short + 1)]
    found = Recording({"text_encoder": joined_rows(calls)}, {}, {})
    batches = found.batches("text_encoder")
    assert [batch["input_ids"].shape for batch in batches] == [(2, 6), (4, 4)] and found.count("text_encoder") == 6
    assert all(np.array_equal(batch["attention_mask"], batch["input_ids"] > 1) for batch in batches)


def _refuse(*progress: Any) -> None:
    raise AssertionError("the cache has these rows")


def test_the_list_of_the_package() -> None:
    texts = read_prompts("default").prompts

    assert len(texts) == len(set(texts)) == 128
    assert min(map(len, texts)) < 25 and max(map(len, texts)) > 140
    assert sum(any(mark in text for mark in ('"', "OPEN", "says", "word", "name", "reads")) for text in texts) >= 8
    assert all(text == text.strip() and text.isprintable() for text in texts)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("\n \n", "there are no prompts"),
        ("a\n" * (MOST_PROMPTS + 1), f"{MOST_PROMPTS + 1} prompts, the limit is {MOST_PROMPTS}"),
        ("a\n" + "b" * 5000, "prompt 2 has 5000 characters"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
    ],
)
def test_a_file_without_usable_prompts(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConditionError, match=complaint) as caught:
        read_prompts(file)
    assert caught.value.hint and str(file) == caught.value.where


def test_no_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConditionError, match="cannot be read") as caught:
        read_prompts(tmp_path / "none.txt")
    assert "--prompts default" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"prompts": "default", "conditions": "random"}, "prompts and --conditions were given"),
        ({"prompts": "default", "unconditional": {"a": np.ones(1)}}, "prompts and --unconditional were given"),
        ({"negative": "blurry"}, "a negative prompt is for prompts"),
    ],
)
def test_options_that_exclude_each_other(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConditionError, match=complaint) as caught:
        CalibrationOptions(**given)
    assert caught.value.hint


def _index(folder: Path, **changes: Any) -> None:
    file = folder / "model_index.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**data, **changes}.items() if v is not ...}))


def _auto_map(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": "code.Words"}}))


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "model_index.json").unlink(), "need the folder of a pipeline"),
    (lambda folder: _index(folder, _class_name="DDPMPipeline"), "by a DDPMPipeline; these pipelines do it: Stable"),
    (lambda folder: _index(folder, _class_name=["code", "Mine"]), "made of prompts by a "),
    (lambda folder: _index(folder, tokenizer=...), "the pipeline has no tokenizer"),
    (lambda folder: _index(folder, unet=...), "no unet or transformer"),
    (lambda folder: _index(folder, text_encoder=["code", "Encoder"]), "is code.Encoder, and only classes of"),
    (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no folder tokenizer"),
    (_auto_map, r"asks for code of its own \(auto_map\)"),
]


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES)
def test_a_folder_that_cannot_encode_is_refused_before_it_is_loaded(
    folder: Path, tmp_path: Path, damage: Callable[[Path], Any], complaint: str
) -> None:
    copy = tmp_path / "pipe"
    shutil.copytree(folder, copy)
    damage(copy)

    with pytest.raises(ConditionError, match=complaint) as caught:
        prompt_pipeline(copy)
    assert caught.value.hint and str(copy) in (caught.value.where or "")


def test_encoders_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pipe"
    shutil.copytree(folder, copy)
    (copy / "text_encoder" / "model.safetensors").write_bytes(b"no weights")

    with pytest.raises(ConditionError, match="encoders cannot be loaded") as caught:
        prompt_rows(prompt_plan(copy, "default", None, 1), guided=False)
    assert "--conditions" in (caught.value.hint or "")


def test_a_module_in_memory_has_no_encoders(tmp_path: Path) -> None:
    module = torch.nn.Linear(1, 1)
    given = CompileOptions(
        deployment=DeploymentOptions(steps=3, scheduler="sd"), calibration=CalibrationOptions(prompts="default")
    )
    with pytest.raises(ConditionError, match="this is a module in memory"):
        prepare(module, tmp_path / "b", given)
