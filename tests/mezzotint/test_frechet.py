"""The Frechet distance against its formula, moments that add up, and the embedded network on real digits."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file
from scipy.linalg import sqrtm

from mezzotint.compiler.errors import OutputError
from mezzotint.frechet import CLASSIFIER, FeatureNet, Moments, frechet_distance
from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.signature import Images

DIGITS = Path(__file__).parents[1] / "data" / "mnist_20.png"
LABELS = [*range(10), *range(10)]


def moments_of(features: npt.NDArray[np.floating]) -> Moments:
    moments = Moments()
    moments.add(features)
    return moments


def features(seed: int, n: int = 60, d: int = 5, offset: float = 0.0) -> Doubles:
    """Correlated features around an offset."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d) + offset


def exactly(mean: Doubles, covariance: Doubles, n: int = 40) -> Doubles:
    """Features `[n, d]` whose sample mean and covariance are these, to rounding."""
    raw = np.random.default_rng(0).normal(size=(n, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T)).T)
    return white @ np.linalg.cholesky(covariance).T + mean


def by_formula(one: Doubles, other: Doubles) -> float:
    """The paper's formula, with scipy's root of the product of two covariances, which is not symmetric."""
    s1, s2 = np.cov(one.T), np.cov(other.T)
    gap = one.mean(axis=0) - other.mean(axis=0)
    return float(gap @ gap + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2))))


def digits() -> Images:
    """The twenty digits of tests/data, padded to `[20, 1, 32, 32]` in [-1, 1]."""
    with Image.open(DIGITS) as sheet:
        rows = np.asarray(sheet).reshape(4, 28, 5, 28).transpose(0, 2, 1, 3).reshape(20, 28, 28)
    return np.pad(rows, ((0, 0), (2, 2), (2, 2)))[:, None].astype(np.float32) / np.float32(127.5) - np.float32(1)


@pytest.fixture(scope="module")
def net() -> FeatureNet:
    return FeatureNet(threads=1)


def network(folder: Path, text: str) -> Path:
    """An ONNX file of the graph `net (inputs) => (outputs) {...}`."""
    head = '<ir_version: 10, opset_import: ["" : 21]> net '
    path = folder / "net.onnx"
    onnx.save(onnx.parser.parse_model(head + text), path)
    return path


# The distance.


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_formula(seed: int) -> None:
    one, other = features(seed), features(seed + 10, n=80)
    wanted = by_formula(one, other)
    assert frechet_distance(moments_of(one), moments_of(other)) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(moments_of(other), moments_of(one)) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(moments_of(one * 1.01), moments_of(other)) != pytest.approx(wanted, rel=1e-4)


def test_gaussians_whose_distance_is_known() -> None:
    """Covariances with common axes: the sum of squared differences of standard deviations, plus that of means."""
    one = exactly(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    other = exactly(np.array([0.0, 1.0, 5.0]), np.diag([4.0, 4.0, 0.25]))
    found = frechet_distance(moments_of(one), moments_of(other))
    assert found == pytest.approx(3**2 + 1**2 + 0 + 2.5**2, rel=1e-9)


def test_a_set_is_at_no_distance_from_itself() -> None:
    one = features(1, n=64, d=32)
    assert frechet_distance(moments_of(one), moments_of(one)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(moments_of(one), moments_of(one[::-1].copy())) == pytest.approx(0, abs=1e-10)


def test_directions_without_any_spread() -> None:
    """The root of a product's eigenvalues, the twin here, errs by as much as this whole distance."""
    flat = features(2, n=100, d=64) * (np.arange(64) % 3 == 0)
    wanted = 64 * 1e-3**2
    assert frechet_distance(moments_of(flat), moments_of(flat + 1e-3)) == pytest.approx(wanted, rel=1e-6)
    covariance = np.cov(flat.T)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance @ root), 0)).sum()
    assert wanted + 2 * (np.trace(covariance) - overlap) != pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("shift", [0.001, 0.1])
def test_a_shifted_mean_is_seen(shift: float) -> None:
    one = features(3)
    assert frechet_distance(moments_of(one), moments_of(one + shift)) == pytest.approx(5 * shift**2, rel=1e-6)


def test_another_spread_is_seen_though_the_means_agree() -> None:
    one = exactly(np.zeros(4), np.eye(4))
    wanted = 4 * (1.5 - 1) ** 2
    assert frechet_distance(moments_of(one), moments_of(one * 1.5)) == pytest.approx(wanted, rel=1e-9)


def test_few_images_and_other_sizes_are_refused() -> None:
    enough = moments_of(features(4))
    with pytest.raises(InputError, match="4 images are too few for 5 features") as caught:
        frechet_distance(moments_of(features(4, n=4)), enough)
    assert "at least 5" in (caught.value.hint or "")
    with pytest.raises(InputError, match="4 images are too few"):
        frechet_distance(enough, moments_of(features(4, n=4)))
    assert frechet_distance(moments_of(features(4, n=5)), enough) > 0
    with pytest.raises(InputError, match="0 images are too few"):
        frechet_distance(Moments(), Moments())
    with pytest.raises(InputError, match="of 5 and of 4 features"):
        frechet_distance(enough, moments_of(features(4, d=4)))


# Moments.


def check_moments(moments: Moments, rows: Doubles) -> None:
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.T), rtol=1e-9, atol=1e-12)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), data=st.data())
def test_parts_add_up_to_the_whole(sizes: list[int], data: st.DataObject) -> None:
    rows = features(7, n=sum(sizes) + 1)
    left, right = Moments(), Moments()
    left.add(rows[:1])
    first = 1
    for size in sizes:
        (left if data.draw(st.booleans()) else right).add(rows[first : first + size])
        first += size
    check_moments(left + right, rows)
    check_moments(right + left, rows)
    with pytest.raises(AssertionError):
        check_moments(left + right, rows * 1.01)


def test_a_sum_leaves_its_parts_alone() -> None:
    rows = features(8)
    left, right = moments_of(rows[:20]), moments_of(rows[20:])
    total = left + right
    left.add(rows)
    total.add(rows)
    check_moments(right, rows[20:])
    check_moments(total, np.concatenate([rows, rows]))


def test_features_far_from_zero_keep_their_digits() -> None:
    """Sums of raw squares lose 12 of 16 digits here; the twin shows that the bound would notice."""
    rows = features(9, offset=1e6)
    parts = moments_of(rows[:7]) + moments_of(rows[7:])
    np.testing.assert_allclose(parts.covariance, np.cov(rows.T), rtol=1e-6, atol=1e-6)
    raw = (rows.T @ rows - len(rows) * np.outer(rows.mean(axis=0), rows.mean(axis=0))) / (len(rows) - 1)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(raw, np.cov(rows.T), rtol=1e-6, atol=1e-6)


def test_half_precision_is_summed_in_double() -> None:
    rows = features(10).astype(np.float16)
    check_moments(moments_of(rows), rows.astype(np.float64))


def test_a_file_gives_the_moments_back(tmp_path: Path) -> None:
    moments = Moments("a net")
    moments.add(features(11))
    for name in ("one", "other"):
        moments.save(tmp_path / "new" / name)
    loaded = Moments.load(tmp_path / "new" / "one")
    assert (loaded.net, loaded.count, loaded.dimensions) == ("a net", 60, 5)
    np.testing.assert_array_equal(loaded.mean, moments.mean)
    np.testing.assert_array_equal(loaded.covariance, moments.covariance)
    assert (tmp_path / "new" / "one").read_bytes() == (tmp_path / "new" / "other").read_bytes()
    Moments().save(tmp_path / "empty")
    assert (Moments.load(tmp_path / "empty") + moments).count == 60


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    with pytest.raises(InputError, match="cannot read moments"):
        Moments.load(path)
    moments_of(features(12)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="cannot read moments"):
        Moments.load(path)
    save_file({"mean": np.zeros(2)}, path)
    with pytest.raises(InputError, match="cannot read moments"):
        Moments.load(path)
    for mean, scatter, count in (
        (np.zeros(2), np.eye(3), 9),
        (np.zeros(2), np.eye(2, dtype=np.float32), 9),
        (np.zeros(2), np.full((2, 2), np.nan), 9),
        (np.zeros(2), np.eye(2), 0),
        (np.zeros(2), np.eye(2), -1),
    ):
        facts = f'{{"count": {count}, "net": ""}}'
        save_file({"mean": mean, "scatter": scatter}, path, {"mezzotint.moments": facts})
        with pytest.raises(InputError, match="no moments of features") as caught:
            Moments.load(path)
        assert caught.value.where == str(path)


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "moments.safetensors"
    moments_of(features(13)).save(target)
    before = target.read_bytes()
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="the disk is full"):
        moments_of(features(14)).save(target)
    assert target.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros(5),
        np.zeros((0, 5)),
        np.zeros((5, 0)),
        np.full((2, 5), np.inf),
        np.array([["a"]]),
        np.ones((2, 5), "c8"),
    ],
)
def test_other_arrays_are_refused_and_not_added(rows: npt.NDArray[np.generic]) -> None:
    moments = moments_of(features(15))
    with pytest.raises(InputError, match="features are"):
        moments.add(rows)
    check_moments(moments, features(15))


def test_moments_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InputError, match="4 features cannot be added to 5"):
        moments_of(features(16)).add(features(16, d=4))
    with pytest.raises(InputError, match="1 images have no covariance"):
        _ = moments_of(features(16, n=1)).covariance
    one, other, unknown = Moments("a" * 64), Moments("b" * 64), Moments()
    for moments in (one, other, unknown):
        moments.add(features(16))
    with pytest.raises(InputError, match=r"two networks, a{12} and b{12},"):
        _ = one + other
    with pytest.raises(InputError, match="two networks"):
        frechet_distance(one, other)
    assert (unknown + one).net == one.net
    assert frechet_distance(unknown, one) == pytest.approx(0, abs=1e-10)


# The embedded network.


def check_classes(classes: npt.NDArray[np.int64], labels: list[int]) -> None:
    assert classes.dtype == np.int64
    assert classes.tolist() == labels


def test_the_embedded_network_reads_digits(net: FeatureNet) -> None:
    images = digits()
    check_classes(net.classify(images), LABELS)
    with pytest.raises(AssertionError):
        check_classes(net.classify(images[::-1]), LABELS)
    with pytest.raises(AssertionError):
        check_classes(net.classify(-images), LABELS)  # in [1, -1]: black on white


def test_its_file_is_small_and_names_no_machine() -> None:
    data = CLASSIFIER.read_bytes()
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert len(data) < 700_000 and b".py" not in data and b"/tmp" not in data and b"/home" not in data
    assert sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == 1) == 89_802 < 150_000
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    values = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.output)}
    shapes = {name: [d.dim_param or d.dim_value for d in kind.shape.dim] for name, kind in values.items()}
    maps = shapes.pop("spatial")
    assert shapes == {"images": ["batch", 1, 32, 32], "features": ["batch", 64], "logits": ["batch", 10]}
    assert maps == ["batch", 32, 8, 8]
    assert {kind.elem_type for kind in values.values()} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("n", [1, 20])
def test_features_are_float32_and_the_same_twice(net: FeatureNet, n: int) -> None:
    images = digits()[:n]
    found = net.features(images)
    assert found.shape == (n, 64) and found.dtype == np.float32
    np.testing.assert_array_equal(found, net.features(images))
    np.testing.assert_array_equal(found, FeatureNet(threads=1).features(images))


def test_the_features_of_an_image_do_not_depend_on_its_batch(net: FeatureNet) -> None:
    whole, parts = net.features(digits()), net.features(digits(), batch=3)
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(net.features(digits() * np.float32(0.99), batch=3), whole, atol=1e-4)


def test_features_of_digits_are_of_size_one(net: FeatureNet) -> None:
    """Standardized over MNIST's training images: a mean square of 1, roughly so for twenty images."""
    assert 0.7 < float(np.mean(net.features(digits()) ** 2)) < 1.4


def test_noise_is_seen_and_more_noise_more(net: FeatureNet) -> None:
    """Each digit at 25 places, all different: enough images for 64 features."""
    moved = np.concatenate([np.roll(digits(), (y, x), (2, 3)) for y in range(-2, 3) for x in range(-2, 3)])
    noise = np.random.default_rng(0).standard_normal(moved.shape).astype(np.float32)
    clean = net.moments(moved)
    distances = [frechet_distance(clean, net.moments(moved + np.float32(s) * noise)) for s in (0, 0.1, 0.3)]
    assert distances[0] == pytest.approx(0, abs=1e-9)
    assert 0.01 < distances[1] < 0.2 and distances[2] > 10 * distances[1]


def test_moments_of_images_are_those_of_their_features(net: FeatureNet) -> None:
    images = digits()
    found = net.moments(images, batch=6)
    check = moments_of(net.features(images, batch=6))
    assert (found.count, found.net) == (20, net.digest)
    np.testing.assert_allclose(found.covariance, check.covariance, rtol=1e-9, atol=1e-12)


def test_agreement_is_a_share_of_pairs(net: FeatureNet) -> None:
    images = digits()
    assert net.agreement(images, images) == 1.0
    other = images.copy()
    other[:5] = images[5:10]  # each another digit
    assert net.agreement(images, other) == 0.75
    assert net.agreement(images, np.roll(images, 1, axis=0)) == 0.0
    with pytest.raises(InputError, match="20 and 19 images are not pairs"):
        net.agreement(images, images[1:])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 32, 32), np.float32), r"\[2, 3, 32, 32\], the network takes \['n', 1, 32, 32\]"),
        (np.zeros((2, 1, 28, 28), np.float32), r"\[2, 1, 28, 28\], the network takes"),
        (np.zeros((2, 1, 32, 32)), "float64 .* expected float32"),
        (np.zeros((2, 1, 32, 32), np.uint8), "uint8 .* expected float32"),
        (np.zeros((1, 32, 32), np.float32), r"\[1, 32, 32\], expected float32"),
        (np.zeros((0, 1, 32, 32), np.float32), r"\[0, 1, 32, 32\], expected float32"),
        (np.full((2, 1, 32, 32), np.nan, np.float32), "is not finite"),
    ],
)
def test_other_images_are_refused(net: FeatureNet, images: Images, message: str) -> None:
    for call in (net.features, net.classify, net.moments):
        with pytest.raises(InputError, match=message) as caught:
            call(images)
        assert caught.value.where == str(CLASSIFIER)


def test_a_batch_of_none_is_refused(net: FeatureNet) -> None:
    with pytest.raises(InputError, match="batches of 0 images"):
        net.features(digits(), batch=0)


# Any other network.


def test_another_network_and_another_output(tmp_path: Path) -> None:
    """Means of the channels, as a pooled network gives them: `[batch, D, 1, 1]`, height and width open."""
    path = network(
        tmp_path, "(float[N,3,H,W] picture) => (float[N,3,1,1] pooled) { pooled = GlobalAveragePool (picture) }"
    )
    images = np.random.default_rng(0).normal(size=(5, 3, 6, 4)).astype(np.float32)
    other = FeatureNet(path, output="pooled", threads=1)
    np.testing.assert_allclose(other.features(images, batch=2), images.mean(axis=(2, 3)), atol=1e-6)
    assert other.digest != FeatureNet(threads=1).digest
    with pytest.raises(InputError, match="no float32 output 'logits'"):
        other.classify(images)
    with pytest.raises(InputError, match=r"no float32 output 'features'.*pooled") as caught:
        FeatureNet(path)
    assert caught.value.where == str(path)


def test_weights_next_to_the_graph_belong_to_its_digest(tmp_path: Path) -> None:
    path = network(
        tmp_path,
        "(float[N,1,1,2] picture) => (float[N,2] features) <float[1] gain = {0}>"
        "{ flat = Flatten <axis = 1> (picture) features = Mul (flat, gain) }",
    )
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full(1, 2, np.float32), "gain"))
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    images = np.ones((1, 1, 1, 2), np.float32)
    first = FeatureNet(path, threads=1)
    assert first.features(images).tolist() == [[2, 2]]
    (tmp_path / "new").write_bytes(np.float32(3).tobytes())
    (tmp_path / "new").replace(tmp_path / "net.onnx.data")  # the first session still has the old file mapped
    second = FeatureNet(path, threads=1)
    assert second.features(images).tolist() == [[3, 3]]
    assert first.digest != second.digest
    assert first.digest != FeatureNet(threads=1).digest


def test_a_batch_that_is_written_into_the_graph(tmp_path: Path) -> None:
    path = network(
        tmp_path, "(float[4,1,2,2] picture) => (float[4,4] features) { features = Flatten <axis = 1> (picture) }"
    )
    images = np.arange(24, dtype=np.float32).reshape(6, 1, 2, 2)
    np.testing.assert_array_equal(FeatureNet(path, threads=1).features(images), images.reshape(6, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(float[N,2] x) => (float[N,2] features) { features = Relu (x) }", "the network takes x .* expected float32"),
        ("(double[N,1,2,2] x) => (double[N,1,2,2] features) { features = Relu (x) }", "expected float32"),
        ("(float[N,1,2,2] x, float[N,1,2,2] y) => (float[N,1,2,2] features) { features = Add (x, y) }", "alone"),
    ],
)
def test_networks_without_one_input_of_images_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FeatureNet(network(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(float[N,1,2,2] x) => (float[N,1,2,2] features) { features = Relu (x) }", r"expected \[batch, D\]"),
        ("(float[N,1,A,B] x) => (float[N,M] features) { features = Reshape (x, s) }", "onnxruntime refused images"),
    ],
)
def test_networks_that_return_no_rows_are_refused(tmp_path: Path, text: str, message: str) -> None:
    text = text.replace("{ features = Reshape", "{ s = Constant <value_ints = [-1, 3]> () features = Reshape")
    with pytest.raises(InputError, match=message):
        FeatureNet(network(tmp_path, text), threads=1).features(np.zeros((2, 1, 2, 2), np.float32))


def test_files_that_are_no_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    for path in (tmp_path / "text.onnx", tmp_path / "nowhere.onnx"):
        with pytest.raises(InputError, match="cannot open the model"):
            FeatureNet(path)
