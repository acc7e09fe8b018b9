"""Feature extractors by name and by path, and LPIPS."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.evaluate.extractors import (
    DIGITS,
    NONE,
    TORCH_BATCH,
    default_extractor,
    open_extractor,
    perceptual_distance,
)
from mezzotint.frechet import FeatureNet
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.signature import Images
from tests.helpers.feature_nets import CLASSES, FEATURES, feature_net

HERE = "tests.helpers.feature_nets"
GREY, COLOUR = (1, 8, 8), (3, 8, 8)


def random_images(n: int, shape: tuple[int, int, int] = GREY) -> Images:
    return np.random.default_rng(0).uniform(-1, 1, (n, *shape)).astype(np.float32)


class TestTorch:
    """Modules that follow the conventions of torchmetrics and torch-fidelity."""

    def test_grey_images_are_passed_as_three_channels_of_bytes(self) -> None:
        net = open_extractor(f"{HERE}:Means", GREY)
        levels = np.stack([np.full(GREY, value, np.float32) for value in (-1, -0.5, 1, 3)])

        np.testing.assert_array_equal(net.measure(levels).features, np.array([[0] * 3, [64] * 3, [255] * 3, [255] * 3]))

    def test_colours_stay_where_they_are(self) -> None:
        images = np.zeros((1, *COLOUR), np.float32)
        images[0, :, :, :] = np.array([-1.0, 0.2, 1.0])[:, None, None]

        np.testing.assert_array_equal(open_extractor(f"{HERE}:Means", COLOUR).measure(images).features, [[0, 153, 255]])

    @pytest.mark.parametrize("name", ["OfFidelity", "INSTANCE", "made", "another"])
    def test_classes_instances_and_functions(self, name: str) -> None:
        images = random_images(TORCH_BATCH + 3)

        found = open_extractor(f"{HERE}:{name}", GREY)

        np.testing.assert_array_equal(
            found.measure(images).features, open_extractor(f"{HERE}:Means", GREY).measure(images).features
        )
        assert found.measure(images).features.shape == (TORCH_BATCH + 3, 3)
        assert found.measure(images).logits is None

    def test_the_digest_is_of_the_weights(self) -> None:
        digests = {name: open_extractor(f"{HERE}:{name}", GREY).digest for name in ("made", "another", "Means")}

        assert len(set(digests.values())) == 3
        assert open_extractor(f"{HERE}:made", GREY).digest == digests["made"]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("TwoOutputs", "returns tuple, expected one tensor"),
            ("OneTooMany", r"returns \[3, 3\] for 2 images"),
            ("Flat", r"returns \[6\] for 2 images"),
            ("Maps", r"returns \[2, 3, 8, 8\] for 2 images"),
            ("Nothing", "features that are not finite"),
            ("WantsFloats", "refused uint8 images .*expected Float"),
            ("NO_MODULE", "is int, not a torch.nn.Module"),
            ("number", "is int, not a torch.nn.Module"),
            ("Weighted", "cannot be made: TypeError: .*weight"),
            ("Missing", "cannot be made: AttributeError"),
        ],
    )
    def test_refusals_come_with_the_name(self, name: str, words: str) -> None:
        with pytest.raises(InputError, match=words) as refused:
            open_extractor(f"{HERE}:{name}", GREY)
        assert refused.value.hint

    @pytest.mark.parametrize("name", ["sys:exit", "os:abort", "os:fork", "builtins:input", "builtins:len", "site:main"])
    def test_what_is_no_network_is_refused(self, name: str) -> None:
        """Functions of the interpreter are not called; one that ends the process is an error like any other."""
        with pytest.raises(InputError, match=r"not a torch.nn.Module|cannot be made"):
            open_extractor(name, GREY)

    def test_a_function_that_ends_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(f"{HERE}.number", lambda: sys.exit(0))
        with pytest.raises(InputError, match="cannot be made: SystemExit"):
            open_extractor(f"{HERE}:number", GREY)

    def test_a_package_that_is_not_there(self) -> None:
        with pytest.raises(InputError, match=r"ModuleNotFoundError.*no_such_package") as refused:
            open_extractor("no_such_package.nets:Net", GREY)
        assert "install it" in str(refused.value.hint)


class TestNames:
    """The other names."""

    def test_digits_are_the_embedded_classifier(self) -> None:
        images, net = random_images(3, (1, 32, 32)), FeatureNet()

        found = open_extractor(DIGITS, (1, 32, 32), threads=1)

        measured = found.measure(images)
        assert found.digest == net.digest and measured.logits is not None and measured.spatial is not None
        np.testing.assert_allclose(measured.features, net.features(images), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(measured.logits.argmax(axis=1), net.classify(images))
        assert measured.spatial.shape == (3, 64), "the first of 32 channels of 8x8, beside 64 features"

    def test_an_onnx_file(self, tmp_path: Path) -> None:
        found = open_extractor(str(feature_net(tmp_path / "net.onnx")), GREY)
        plain = open_extractor(str(feature_net(tmp_path / "plain.onnx", logits=False)), GREY)

        measured = found.measure(random_images(3))
        assert measured.features.shape == (3, FEATURES)
        assert measured.logits is not None and measured.logits.shape == (3, CLASSES)
        assert plain.measure(random_images(3)).logits is None

    def test_spatial_maps(self) -> None:
        """As many channels as there are no more numbers than features; larger maps are refused."""
        images = random_images(3, COLOUR)
        measured = open_extractor(f"{HERE}:Spatial", COLOUR).measure(images)
        assert measured.spatial is not None and measured.spatial.shape == (3, 128) and measured.logits is None
        np.testing.assert_array_equal(measured.spatial, measured.features[:, :128])
        with pytest.raises(InputError, match="spatial maps of 8x8 have more numbers than its 63 features"):
            open_extractor(f"{HERE}:TooLarge", COLOUR)

    @pytest.mark.parametrize(
        ("name", "shape", "words"),
        [
            ("none.onnx", GREY, "onnxruntime cannot open"),
            (DIGITS, GREY, "the network takes"),
            ("mnist", GREY, "no feature extractor is called 'mnist'"),
            (f"{HERE}:Means", (4, 8, 8), "samples of 4 channels are latents"),
        ],
    )
    def test_refusals(self, name: str, shape: tuple[int, int, int], words: str) -> None:
        with pytest.raises(InputError, match=words):
            open_extractor(name, shape)

    def test_inception_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mezzotint.evaluate.extractors.find_spec", lambda name: None)
        with pytest.raises(InputError, match="torch-fidelity's, which is not installed") as refused:
            open_extractor("inception", GREY)
        assert "pip install torch-fidelity" in str(refused.value.hint)

    def test_inception_is_the_network_of_torch_fidelity(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stand-in of its interface: the real one downloads its weights."""
        from tests.helpers.feature_nets import TwoOutputs

        def extractor(name: str, features: list[str]) -> torch.nn.Module:
            assert (name, features) == ("inception-v3-compat", ["2048", "logits_unbiased"])
            return TwoOutputs()

        place = "torch_fidelity.feature_extractor_inceptionv3"
        pretend(monkeypatch, "torch_fidelity")
        pretend(monkeypatch, place, FeatureExtractorInceptionV3=extractor)

        measured = open_extractor("inception", GREY).measure(random_images(2))
        assert measured.logits is not None and measured.features.shape == measured.logits.shape == (2, 3)
        pretend(monkeypatch, place, FeatureExtractorInceptionV3=lambda *a: 1 / 0)
        with pytest.raises(InputError, match="inception cannot be made: ZeroDivisionError"):
            open_extractor("inception", GREY)

    def test_the_default(self) -> None:
        assert default_extractor((1, 32, 32)) == (DIGITS, "")
        name, why = default_extractor((3, 32, 32))
        assert name == NONE and "not 3x32x32" in why


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A package of this name is installed."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


class SquaredDistance(torch.nn.Module):
    """LPIPS's interface: [N, 3, H, W] in [-1, 1], twice; [N, 1, 1, 1]."""

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert one.shape[1] == 3 and one.abs().max() <= 1
        return ((one - other) ** 2).mean(dim=(1, 2, 3), keepdim=True)


class TestLPIPS:
    """Told of where it is not, and called as its packages want it."""

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mezzotint.evaluate.extractors.find_spec", lambda name: None)

        assert perceptual_distance() == (None, "neither lpips nor torchmetrics is installed")

    def test_pairs_are_compared_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend(monkeypatch, "lpips", LPIPS=lambda net, verbose: SquaredDistance())
        one, other = random_images(3), random_images(6)[3:] * 1.5

        distance, why = perceptual_distance()

        assert distance is not None and why == ""
        wanted = ((one - np.clip(other, -1, 1)) ** 2).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(distance(one, other), wanted, rtol=1e-5)
        assert (distance(one, one) == 0).all()

    def test_torchmetrics_has_it_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lpips", None)
        find = sys.modules["importlib.util"].find_spec
        monkeypatch.setattr(
            "mezzotint.evaluate.extractors.find_spec", lambda name: None if name == "lpips" else find(name)
        )
        pretend(monkeypatch, "torchmetrics")
        pretend(monkeypatch, "torchmetrics.image")
        made = {"LearnedPerceptualImagePatchSimilarity": lambda net_type: SquaredDistance()}
        pretend(monkeypatch, "torchmetrics.image.lpip", **made)

        distance, _ = perceptual_distance()

        assert distance is not None and distance(random_images(2), random_images(2)).shape == (2,)

    def test_a_package_that_cannot_be_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend(monkeypatch, "lpips", LPIPS=lambda net, verbose: 1 / 0)

        assert perceptual_distance() == (None, "lpips is installed and cannot be used: division by zero")
