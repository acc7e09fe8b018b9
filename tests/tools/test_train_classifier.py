"""The training of the classifier: one seed, one file; what it writes is what it trained."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from mezzotint.compiler.errors import OutputError
from mezzotint.frechet import FeatureNet
from mezzotint.runtime.errors import InputError, MezzotintError
from tools import train_classifier
from tools.train_classifier import FILES, Classifier, Digits, Options, check, export, fit, main, train

OPTIONS = Options(epochs=2, seed=5, batch=8, rate=1e-2)


def bars(seed: int, n: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A bar of some width for each class, with noise: learnt within a few steps."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.uint8) % 10
    images = rng.integers(0, 40, (n, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4:24, 2 : 4 + 2 * int(label)] = 255
    return images, labels


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed, (name, n) in enumerate(zip(FILES, (40, 20), strict=True)):
        images, labels = bars(seed, n)
        np.savez(tmp_path / name, x=images, y=labels)
    return tmp_path


def test_the_file_is_what_was_trained(data: Path) -> None:
    path = data / "new" / "model.onnx"
    accuracy, model = train(data, path, OPTIONS, device="cpu")
    images = Digits.load(data / FILES[1]).images(slice(None))
    with torch.no_grad():
        features, logits, maps = (found.numpy() for found in model(torch.from_numpy(images)))
    net = FeatureNet(path, threads=1)
    np.testing.assert_allclose(net.features(images), features, atol=1e-3)
    np.testing.assert_allclose(net.measure(images)["spatial"], maps, atol=1e-3)
    np.testing.assert_array_equal(net.classify(images), logits.argmax(axis=1))
    assert accuracy == np.mean(net.classify(images) == np.arange(20) % 10)
    onnx.checker.check_model(str(path))
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert ops == {"Conv", "Sigmoid", "Mul", "Reshape", "Gemm"}  # normalizations and dropout are gone
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_another_network_is_noticed(data: Path) -> None:
    """The planted error of the check that every file goes through: one weight in a hundred, 1 %."""
    digits = Digits.load(data / FILES[0])
    model = fit(digits, OPTIONS, "cpu")
    path = data / "model.onnx"
    path.write_bytes(export(model))
    check(path, model, digits)
    with torch.no_grad():
        model.features.weight[::10] *= 1.01
    with pytest.raises(MezzotintError, match="away from torch's"):
        check(path, model, digits)


def test_features_have_mean_0_and_variance_1_over_the_training_pictures(data: Path) -> None:
    digits = Digits.load(data / FILES[0])
    model = fit(digits, OPTIONS, "cpu").folded()
    features = model(torch.from_numpy(digits.images(slice(None))))[0].detach().numpy()
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(features.var(axis=0, ddof=1), 1, atol=1e-2)


def test_one_seed_gives_one_file(data: Path) -> None:
    paths = [data / "one.onnx", data / "other.onnx"]
    for path in paths:
        train(data, path, OPTIONS, device="cpu")
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert b".py" not in first and str(data).encode() not in first


def test_the_seed_decides_more_than_the_first_weights(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and dropout follow it too: with the start held fixed, another seed still gives other weights."""
    digits = Digits.load(data / FILES[0])
    start = Classifier().state_dict()

    def same_start(self: Classifier, device: str) -> Classifier:
        self.load_state_dict(start)
        return self

    monkeypatch.setattr(Classifier, "to", same_start)
    weights = [fit(digits, Options(1, seed, 8, 1e-2), "cpu").head.weight.detach() for seed in (5, 6, 5)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_a_full_disk_keeps_the_file_that_was_there(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = data / "out" / "model.onnx"
    target.parent.mkdir()
    target.write_bytes(b"an old one")
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write(path, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_classifier, "export", lambda model: bytes(1000))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="the disk is full"):
        train(data, target, Options(1, batch=8), device="cpu")
    assert target.read_bytes() == b"an old one"
    assert [file.name for file in target.parent.iterdir()] == ["model.onnx"]


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda logits, labels: nan * 1)
    with pytest.raises(MezzotintError, match="the loss became nan at step 0"):
        train(data, data / "model.onnx", OPTIONS, device="cpu")
    assert not (data / "model.onnx").exists()


def test_it_learns_and_says_how_well(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "model.onnx"
    options = ["--epochs", "12", "--batch", "8", "--rate", "0.01", "--device", "cpu"]
    assert main(["--data", str(data), "-o", str(path), *options]) == 0
    said = capsys.readouterr().out
    found = re.search(r"accuracy (\S+) on the test pictures, 89802 parameters, (\d+) bytes", said)
    assert found is not None
    assert float(found[1]) > 0.8  # by chance: 0.1
    assert int(found[2]) == path.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "cannot read the images"),
        (["--epochs", "0"], "epochs and rate are positive"),
        (["--batch", "1"], "a batch is 2 or more"),
        (["--batch", "41"], "40 images are fewer than one batch of 41"),
        (["--device", "abacus"], "torch has no device 'abacus'"),
        (["--output", "model.bin"], "the output is no .onnx file"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    usual = ["--data", str(data), "-o", str(data / "out" / "model.onnx"), "--batch", "8", "--epochs", "1"]
    assert main([*usual, *arguments]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "Traceback" not in said
    assert not (data / "out").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "cannot read the labels"),
        (np.zeros(39, np.uint8), r"`y` is uint8 \[39\], expected integers \[40\]"),
        (np.zeros(40), r"`y` is float64"),
        (np.full(40, 10, np.uint8), "labels go from 10 to 10"),
    ],
)
def test_labels_that_do_not_fit_are_refused(data: Path, labels: npt.NDArray[np.generic] | None, message: str) -> None:
    images, _ = bars(0, 40)
    arrays: dict[str, npt.NDArray[np.generic]] = {"x": images} | ({} if labels is None else {"y": labels})
    np.savez(data / FILES[0], allow_pickle=False, **arrays)
    with pytest.raises(InputError, match=message) as caught:
        train(data, data / "model.onnx", OPTIONS, device="cpu")
    assert caught.value.where == str(data / FILES[0])
