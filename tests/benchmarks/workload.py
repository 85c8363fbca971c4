"""What the benchmarks train: generated photographs, the networks, and the experiment in this library's terms."""

import os
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CLASSES = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORKS = {  # config.model, and the function of torchvision.models
    "squeezenet": (dict(name="squeezenet", variant="1.1"), "squeezenet1_1"),
    "mobilenet_v2": (dict(name="mobilenet_v2", variant="1.0"), "mobilenet_v2"),
    "resnet18": (dict(name="resnet", variant="18"), "resnet18"),
    "resnet50": (dict(name="resnet", variant="50"), "resnet50"),
    "mobilenet_v3": (dict(name="mobilenet_v3", variant="large"), "mobilenet_v3_large"),
    "efficientnet_b0": (dict(name="efficientnet", variant="b0"), "efficientnet_b0"),
    "shufflenet_g3": (dict(name="shufflenet", variant="1.0-g3"), None),
}
OPTIM = dict(name="sgd", lr=1e-3, momentum=0.9, decay=1e-4)


def cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def allocator(name: str) -> None:
    """Sets the C library's allocator up as run.py does ("keep"), or leaves it as it is ("plain")."""
    from squeeze_jax.jobs import _allocator

    if name == "keep":
        _allocator.keep_memory()


def photographs(folder: Path, count: int, side: int) -> None:
    """Writes JPEG files of random smooth fields, `side` pixels wide, as `folder/{train,test}/CLASS/*.jpg`.

    The fields have the spectrum of photographs, amplitude ~ 1 / frequency, so that decoding takes as long as theirs.
    """
    rng = np.random.default_rng(0)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    spectrum = (1 / np.maximum(f, 1 / side))[..., None]  # [side, side / 2 + 1, 1]
    for i in range(count + CLASSES):
        noise = rng.normal(size=(2, *spectrum.shape[:2], 3))
        field = np.fft.irfft2(
            (noise[0] + 1j * noise[1]) * spectrum, (side, side), (0, 1)
        )
        pixels = np.clip(128 + 50 * field / field.std(), 0, 255).astype(np.uint8)
        split = "train" if i < count else "test"
        path = folder / split / f"class{i % CLASSES}" / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def build(network: str, batch: int, data: dict, **keys):
    """The experiment, as run.py builds it from a config."""
    from squeeze_jax.jobs import _experiment

    config = dict(
        steps=10**9,  # whoever alternates ends it
        batch=batch,
        data=dict(mean=MEAN, std=STD, **data),
        model=NETWORKS[network][0],
        optim=OPTIM | {"schedule": "constant"},
    )
    return _experiment.build(_experiment.check(config | keys))


def step(built):
    """The compiled training step."""
    from squeeze_jax.jobs import _teachers, fit

    spec = built.data.specs(built.experiment.batch)[-1]
    return fit.compile_step(built, spec, _teachers.TeacherOutputs())


def key(built):
    """The run's random key, placed on the devices."""
    import jax

    from squeeze_jax.train import sharding

    one = sharding.replicated(built.mesh)
    return jax.jit(lambda: jax.random.key(1), out_shardings=one)()


def load() -> str:
    """How busy the machine is besides: the load averages, and a warning where that makes the numbers worthless."""
    averages = os.getloadavg()
    if averages[0] > 0.5:
        warnings.warn(
            f"the machine is busy (load {averages[0]:.2f}): ratios may be off",
            stacklevel=2,
        )
    return " ".join(f"{a:.2f}" for a in averages)


def origin(load: str) -> dict:
    """Where the numbers come from; of the library's provenance, with PyTorch's versions and the load at the begin."""
    from squeeze_jax.report import provenance

    peers = provenance.versions(("torch", "torchvision", "pillow"))
    found = provenance.collect()
    return found | {"packages": found["packages"] | peers, "load": load}


def say(origin: dict) -> str:
    """Two lines of `origin`."""
    machine, packages = origin["machine"], origin["packages"]
    wanted = ("jax", "torch", "torchvision", "pillow", "numpy")
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; load before: {origin['load']}\n"
        + ", ".join(f"{p} {packages[p]}" for p in wanted if p in packages)
    )
