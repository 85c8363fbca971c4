"""Lessons: what teachers say of a batch, computed in the step, or read from a folder where it was computed once."""

import contextlib
import dataclasses
import functools
import inspect
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from squeeze_jax import models, registry
from squeeze_jax.data import Data
from squeeze_jax.data.tasks import images
from squeeze_jax.distill.cache import Cached
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _classes, _objective, _pretrained
from squeeze_jax.ranges import OptionalPath
from squeeze_jax.train import forward, sharding

SECONDS = 10.0  # between lines that tell how far the cache is
HEADS = {"logits", "pooled"}  # outputs that a head has a part in
SAMPLE = 256  # training examples that tell whether a cache is of these data


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.distill`.

    Attributes:
      teachers: networks to learn from, each {"workdir": DIR} of an earlier run or {"folder": DIR} of transformers.
      cache: a folder for their outputs on the training examples, computed once for all runs; "" computes them anew in
        each step.
      cache_dtype: of what is kept there; numbers above 65504, which MobileBERT's layers give, need float32.
    """

    teachers: tuple[dict, ...] = ()
    cache: OptionalPath = ""
    cache_dtype: Literal["float16", "float32"] = "float16"


class Lessons:
    """Teachers' outputs for a step, none by default.

    Attributes:
      teach: (frozen, batch) → a tuple of dicts; None where there is nothing to teach.
      frozen: () or (the teachers' variables on the devices,): what the step takes besides.
    """

    teach: Callable | None = None
    frozen: tuple = ()

    def rows(self, batch: Mapping[str, np.ndarray]) -> tuple:
        """What of the outputs on disk belongs to a batch, on the devices: a dict a teacher, or nothing."""
        return ()

    def spec(self, batch: Mapping[str, Any]) -> tuple:
        """Shapes of `rows` for shapes of a batch."""
        return ()


class Live(Lessons):
    """Teachers that are computed in each step."""

    def __init__(self, built, teach: Callable):
        one = sharding.replicated(built.mesh)
        # A folder of layers alone teaches what the layers say.
        said = HEADS & set(built.objective.wants)
        key = None if said else jax.random.key(0)
        variables = tuple(read(key) for _, read, _ in built.teachers)
        self.frozen, self.teach = (jax.device_put(variables, one),), teach


class Read(Lessons):
    """Teachers' outputs from a folder, a cache for each teacher."""

    def __init__(self, cached: list[Cached], shapes: Callable, mesh):
        self._cached, self.spec, self._mesh = cached, shapes, mesh

    def rows(self, batch):
        found = tuple(
            each.rows(batch["index"], lengths)
            for each, lengths in zip(self._cached, self.spec(batch), strict=True)
        )
        over = sharding.over_batch(self._mesh)
        return jax.tree.map(
            lambda rows: jax.device_put(rows.astype(np.float32), over), found
        )

    @staticmethod
    def teach(batch):
        return batch["teacher"]


def check(distill: Settings, data: Data) -> None:
    """Raises a UserError where the outputs of teachers cannot be kept on disk as the settings say."""
    if not distill.cache:
        return
    if not distill.teachers:
        raise UserError(
            "config.distill.cache has no effect without config.distill.teachers: leave the key out"
        )
    if not data.fixed:
        raise UserError(
            "config.distill.cache: training examples change from epoch to epoch, and with them what teachers say: leave the"
            " key out, or config.data's random changes"
        )
    if jax.process_count() > 1:
        raise UserError(
            "config.distill.cache is written and read by one process: leave the key out, or --coordinator and --processes"
        )


@contextlib.contextmanager
def open(built, say: Callable[[str], None]) -> Iterator[Lessons]:
    """The lessons of an experiment; outputs that are to be cached and are not there yet are computed first.

    Args:
      built: the experiment.
      say: prints a line.

    Raises:
      UserError: a teacher's weights are not there or do not fit, or what it says of an example changes.
    """
    if not built.teachers:
        yield Lessons()
        return
    cache = built.distill.cache
    networks = [network for network, _, _ in built.teachers]
    wants = built.objective.wants
    live = Live(built, _objective.teacher(networks, wants, built.data.inputs))
    if not cache:
        yield live
        return
    shapes = _shapes(built, [n.model for n in networks], wants)
    with contextlib.ExitStack() as stack:
        cached = _caches(built, shapes(built.data.specs(1)[-1]), live.frozen[0])
        for each in cached:
            stack.enter_context(each)
        _fill(built, cached, live, say)
        del live  # and the teachers' memory
        yield Read(cached, shapes, built.mesh)


def _shapes(built, nets, wants) -> Callable:
    """Returns `batch of arrays or shapes → shapes of the teachers' outputs`."""
    names = tuple(built.data.exported)

    @functools.cache
    def found(spec):
        x = jax.eval_shape(built.data.inputs, dict(zip(names, spec, strict=True)))
        given = [_objective.outputs(net, x) for net in nets]
        kept = tuple({k: g[k] for k in wants if k in g} for g in given)
        # What is read is float32, whatever the teachers compute in.
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32), kept)

    def shapes(batch):
        specs = (jax.ShapeDtypeStruct(batch[k].shape, batch[k].dtype) for k in names)
        return found(tuple(specs))

    return shapes


def _caches(built, outputs, variables) -> list[Cached]:
    """A cache for each teacher, open for writing; `outputs` are shapes for a batch of one example."""
    made = []
    data = f"data {_checksum([repr(_ordered(built.experiment.data)).encode()])}"
    data += f" {_sample(built.data)}"
    for number, (shapes, own) in enumerate(zip(outputs, variables, strict=True)):
        network, _, where = built.teachers[number]
        leaves = map(np.ascontiguousarray, jax.tree.leaves(jax.device_get(own)))
        how = repr(network.model) + network.dtype
        one = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes)
        fingerprint = f"{where}, weights {_checksum(leaves)}, network {_checksum([how.encode()])}, {data}"
        folder, dtype = f"{built.distill.cache}/{number}", built.distill.cache_dtype
        made.append(Cached.write(folder, one, built.data.num_train, fingerprint, dtype))
    return made


def _sample(data: Data) -> str:
    """A checksum of some training examples: files may change under the same settings."""
    rows = min(SAMPLE, data.num_train)
    with contextlib.closing(data.train(rows, 0)) as batches:
        batch = next(batches)
    return _checksum(np.ascontiguousarray(batch[k]) for k in sorted(batch))


def _checksum(arrays: Iterable) -> str:
    found = 0
    for each in arrays:
        found = zlib.crc32(each, found)
    return f"{found:08x}"


def _ordered(section):
    """A section of a config, as it is whatever the order of its keys."""
    if isinstance(section, Mapping):
        return [(key, _ordered(section[key])) for key in sorted(section)]
    return section


def _fill(built, cached, live: Live, say: Callable[[str], None]) -> None:
    """Computes what is missing, in the order of training, whose first epoch has each example once."""
    if all(each.complete for each in cached):
        return
    e, data = built.experiment, built.data
    names = tuple(data.exported)
    teach = jax.jit(live.teach)
    begin = last = time.monotonic()
    with contextlib.closing(data.train(e.batch, e.seed)) as batches:
        for number, batch in enumerate(batches):
            if all(each.complete for each in cached):
                break
            if not any(each.lacks(batch["index"]) for each in cached):
                continue  # of a run that was stopped
            arrays = sharding.put_batch({k: batch[k] for k in names}, built.mesh)
            found = jax.device_get(teach(live.frozen[0], arrays))
            for each, outputs in zip(cached, found, strict=True):
                each.put(batch["index"], outputs)
            now = time.monotonic()
            if now - last > SECONDS:
                last, done = now, min((number + 1) * e.batch, data.num_train)
                say(f"teachers   {done:,} of {data.num_train:,} examples")
    for each in cached:
        each.flush()
    say(
        f"teachers   {data.num_train:,} examples in {built.distill.cache}, {time.monotonic() - begin:.0f} s"
    )


def teacher(
    section: Mapping[str, Any], source: Data, where: str, dtype: str = "float32"
) -> tuple[forward.Network, Callable[[jax.Array | None], dict[str, Any]], str]:
    """A network to learn from, a function that reads its variables (see `Network.read`), and where it is.

    Args:
      section: {"folder": …} or {"workdir": …}.
      source: the data; they decide the task of a folder's network.
      where: the section's name in the config.
      dtype: of the computation.

    Raises:
      UserError: no network, or one that does not read the data.
    """
    if not isinstance(section, Mapping):
        raise UserError(
            f'{where} = {section!r} should be {{"workdir": DIR}} or {{"folder": DIR}}'
        )
    registry.check(_pretrained.find, section, where, given=("where",))
    network = _pretrained.suited(
        _pretrained.find(**section, where=where), source.model.get("task")
    )
    name = network.options["name"]
    module = registry.load("squeeze_jax.models", name, "model")
    if (inputs := getattr(module, "INPUTS", "images")) != source.reads:
        raise UserError(
            f"{where} = {network.where} holds {name!r}, which reads {inputs}, but config.data gives {source.reads}: choose"
            f" a teacher of {source.reads}"
        )
    if hasattr(module, "fine_tuned"):
        raise UserError(
            f"{where} = {network.where}: {name!r} draws tokens of its own and cannot say anything of a student's: choose"
            " another teacher"
        )
    _same_pixels(section, source, where)
    options = {**source.model, **network.options}
    net = models.make(**options)
    classes = _classes_of(network, options, source)
    words = getattr(source, "vocabulary", None)
    if words is not None and not _pretrained.reads(net, words):
        raise UserError(
            f"the tokenizer has {words:,} tokens, {where} = {network.where} {net.row.vocabulary:,}: student and teacher"
            " need the same"
        )
    if classes is not None:
        net = _classes.Placed(net, classes)
    as_run = network.as_run(net, source.example(), dtype)
    return as_run, lambda key: network.read(options, key), network.where


def _classes_of(network, options, source) -> tuple[int, ...] | None:
    """The places of the data's classes in a teacher's head; None if they are the same."""
    if options.get("num_classes") != source.model.get("num_classes"):
        return None
    remedy = "choose a teacher of the same classes"
    names = source.label_names
    return _classes.order(network.classes, names, network.where, remedy)


def _same_pixels(section: Mapping[str, Any], source: Data, where: str) -> None:
    """Raises a UserError where a run was trained on images that were normalised otherwise."""
    path = pathlib.Path(section.get("workdir", "")) / "config.json"
    if source.reads != "images" or not path.is_file():
        return
    try:
        begun = json.loads(path.read_bytes())["data"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: run the job fit there again") from None
    known = inspect.signature(images.make).parameters
    for key in "mean", "std":
        theirs, ours = begun.get(key, known[key].default), getattr(source, key)
        if not np.array_equal(*np.broadcast_arrays(theirs, ours)):
            raise UserError(
                f"{where}.workdir = {section['workdir']!r} was trained with config.data.{key} = {tuple(theirs)}, and a teacher"
                f" sees what the student sees: set the key to that, not {ours}"
            )
