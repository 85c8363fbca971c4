"""docs/python.md runs as it stands, and the public names are those that it lists."""

import pathlib
import re
import types

import pytest
import torch

import squeeze_jax as sj
from squeeze_jax import _public

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "python.md"

# A change here is a change of the library for its users.
NAMES = {
    *("BatchNorm", "Conv", "Dense", "UserError", "conv", "cost", "distill", "export"),
    *("forward", "from_nnx", "latency", "load", "losses", "lowering", "metrics"),
    *("models", "optim", "step"),
}
MODULES = {
    "cost": {"by_layer", "latency", "macs", "memory", "parameters", "total"},
    "export": {"Disagreement", "Exported", "load", "make"},
    "losses": {
        *(
            "binary_cross_entropy",
            "causal_lm",
            "cross_entropy",
            "masked_lm",
            "next_token",
        ),
        *("pretraining_loss", "replaced", "span", "squared_error"),
    },
    "models": {"check", "class_names", "elastic", "load", "make", "options", "save"},
}


def test_public_names():
    assert {*sj.__all__} == {*dir(sj)} == NAMES
    assert _public.PLACES.keys() == NAMES
    for name in NAMES:
        assert getattr(sj, name) is not None
    for module, names in MODULES.items():
        assert {*getattr(sj, module).__all__} == names, module
        for name in names:
            assert getattr(getattr(sj, module), name) is not None
    documented = PAGE.read_text()
    for name in NAMES:
        assert f"sj.{name}" in documented, name
    with pytest.raises(
        AttributeError, match="no attribute 'Convv'; did you mean 'Conv'"
    ):
        _ = sj.Convv


@pytest.fixture(scope="module")
def page(torchvision, tmp_path_factory):
    """What the page's program leaves behind, and what it printed."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    weights = torchvision.models.mobilenet_v2(weights=None).state_dict()
    torch.save(weights, folder / "mobilenet_v2.pth")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```python") == 9
    module, printed = types.ModuleType("page"), []
    module.print = lambda *values: printed.append(" ".join(map(str, values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), vars(module))
    return module, printed


def test_the_page_runs(page):
    module, printed = page
    assert module.count.by_layer["conv0"] == 8 * 8 * 27 * 8
    assert printed[0] == f"{module.count.total} 13824"
    assert float(module.accuracy) > 0.9
    assert [file.format for file in module.files] == [
        "stablehlo",
        "tflite",
        "tflite_int8",
    ]
    assert all(file.max_difference < 1e-3 for file in module.files[:2])
