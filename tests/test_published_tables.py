"""Published tables of latencies, and latencies of pieces that are fitted to whole networks."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from squeeze_jax.cost.latency_table import errors
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _plugs
from squeeze_jax.nas import additive, costs, published_tables
from squeeze_jax.nas.family import Family


def pieces_of(choices, **options):
    example = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    options = dict(name="ofa_proxyless", variant="w1.3") | options
    family = Family(options, _plugs.plain(example), choices)
    return family, costs.Pieces(family, example)


def test_a_network_s_latency_on_pixel_1_is_the_sum_of_the_file_s_rows(shared):
    """The operators of the smallest network, written out by hand: two 3x3 blocks with expansion 3 in each stage but the last."""
    path = shared / "data" / "nas" / "proxylessnas_pixel1_lut.yaml"
    family, pieces = pieces_of({"expand": (3, 6)}, width=1.0)
    table = published_tables.proxylessnas(path, "Pixel 1", pieces)
    content = yaml.safe_load(path.read_text())
    total = 0.0
    side, channels = 112, 16
    for features, stride, blocks in ((24, 2, 2), (40, 2, 2), (80, 2, 2), (96, 1, 2), (192, 2, 2), (320, 1, 1)):  # fmt: skip
        for block in range(blocks):
            step = stride if block == 0 else 1
            skip = int(step == 1 and channels == features)
            name = f"expanded_conv-input:{side}x{side}x{channels}-output:"
            side, channels = side // step, features
            name += f"{side}x{side}x{channels}-expand:3-kernel:3-stride:{step}-idskip:{skip}"  # fmt: skip
            total += content[name]["mean"]
    for name in ("Conv-input:224x224x3-output:112x112x32", "Conv_1-input:7x7x320-output:7x7x1280", "Logits-input:7x7x1280-output:1000"):  # fmt: skip
        total += content[name]["mean"]
    total += content["expanded_conv-input:112x112x32-output:112x112x16-expand:1-kernel:3-stride:1-idskip:0"]["mean"]  # fmt: skip
    latency = pieces.latency(table, "pixel")(family.space.smallest())
    assert latency == pytest.approx(total, rel=1e-5)
    assert table.name == "file on Pixel 1, 1 thread"


def test_a_space_that_the_file_does_not_have_is_refused(shared):
    path = shared / "data" / "nas" / "proxylessnas_pixel1_lut.yaml"
    _, pieces = pieces_of({"kernel": (3,), "expand": (3,), "depth": (2,)})
    with pytest.raises(UserError, match=r"has no operator .*'width': 1\.0"):
        published_tables.proxylessnas(path, "Pixel 1", pieces)


def test_fbnet_s_matrix(shared):
    """The first line names nine operators; 22 layers less the header, in microseconds."""
    path = shared / "data" / "nas" / "fbnet_cpu_lut.txt"
    matrix = published_tables.read_matrix(path)
    assert matrix.operators[0] == "ir_k3_e1"
    assert matrix.operators[-1] == "skip"
    rows = path.read_text().splitlines()[1:]
    assert matrix.ms.shape == (len([r for r in rows if r.strip()]), 9)
    assert matrix.ms[0, 0] == pytest.approx(5.129798054695129)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  count: 1\n", "a has no mean above 0"),
        ("a:\n  mean: -1\n", "a has no mean above 0"),
        ("a:\n  mean: .nan\n", "a has no mean above 0"),
        ("a: 3\n", "a has no mean above 0"),
        ("[1]", "names no operator"),
        ("{", "it is no YAML"),
    ],
)
def test_a_wrong_operator_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "lut.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        published_tables.read_operators(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        published_tables.read_operators(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["", "a b\n1 2\n3\n", "a b\n1 x\n", "a b\n1 2 3\n"])
def test_a_wrong_matrix_is_one_line(tmp_path, text):
    path = tmp_path / "lut.txt"
    path.write_text(text)
    with pytest.raises(UserError, match="is no matrix of latencies"):
        published_tables.read_matrix(path)


def test_fitted_pieces_predict_networks_that_were_measured_on_gpus(shared):
    """2,000 of 5,000 networks of once-for-all's space, at 128 to 224 pixels, predict the others.

    Latencies at batch 64 are those of the arithmetic. The time of a convolution grows with the number of its pixels.
    """
    path = shared / "data" / "nas" / "ofa_mbv3_5000_archs_latency_ms.json.gz"
    with gzip.open(path) as file:
        content = json.load(file)
    features = np.stack([features_of(arch) for arch in content["arch"]])
    order = np.random.default_rng(0).permutation(len(features))
    known, unknown = order[:2000], order[2000:]
    for device in "titan_rtx_64", "v100_64", "titan_xp_64":
        measured = np.asarray(content["latency_ms"][device], float)
        weights = additive.fit(features[known], measured[known])
        error = errors(features[unknown] @ weights, measured[unknown])
        assert error["mean"] < 0.03
        assert error["rank"] > 0.99


def features_of(arch):
    """One-hot kernels and expansions of the blocks that are present, once as they are and once times the number of pixels."""
    pixels, choices = (arch["r"] / 224) ** 2, []
    for place, pair in enumerate(zip(arch["ks"], arch["e"], strict=True)):
        present = place % 4 < arch["d"][place // 4]
        choices += [present and pair == (k, e) for k in (3, 5, 7) for e in (3, 4, 6)]
    choices = np.asarray([*choices, True], float)
    return np.concatenate([choices, pixels * choices])


def test_the_fit_finds_the_weights_that_made_the_latencies():
    features = np.asarray([[1, 0, 1], [0, 1, 1], [1, 1, 1], [2, 1, 1.0]])
    weights = additive.fit(features, features @ [3.0, 5.0, 0.5], ridge=0.0)
    np.testing.assert_allclose(weights, [3.0, 5.0, 0.5], rtol=1e-6)
    with pytest.raises(UserError, match=r"give \[n, d\] and \[n\]"):
        additive.fit(features, [1.0])
    with pytest.raises(UserError, match="above 0"):
        additive.fit(features, [1.0, 0.0, 1.0, 1.0])
