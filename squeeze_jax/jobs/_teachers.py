"""Builds the teachers of `config.distill` and supplies their outputs: computed in each step, or cached once on disk."""

import contextlib
import dataclasses
import functools
import inspect
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from squeeze_jax import files, models, registry
from squeeze_jax.data import Data
from squeeze_jax.data.tasks import images
from squeeze_jax.distill.cache import Cached
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _classes, _objective, _pretrained
from squeeze_jax.ranges import OptionalPath
from squeeze_jax.train import forward, sharding

PROGRESS_SECONDS = 10.0  # between two progress lines while a cache is filled
HEAD_OUTPUTS = {"logits", "pooled"}  # outputs that depend on the head's weights
FINGERPRINT_EXAMPLES = 256  # training examples whose checksum identifies the data


class Teacher(NamedTuple):
    """A trained network that the run learns from.

    Attributes:
      network: the network as it is run, with its classes in the order of the data's.
      read_variables: reads its variables, numpy arrays for `forward.run`. It takes a key from `jax.random.key`, which
        initialises the head if a folder lacks it; with None a missing head is a UserError.
      location: the folder or work directory, as lines and error messages name it.
      class_names: names of its classes, in the order of its own head; None if they are unknown, () for a run whose data
        name no classes.
      problem_type: how its classifier was trained, see `_classes.problem_type`; "" if it is unknown.
    """

    network: forward.Network
    read_variables: Callable[[jax.Array | None], dict[str, Any]]
    location: str
    class_names: tuple[str, ...] | None = None
    problem_type: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.distill`.

    Attributes:
      teachers: the networks to learn from: each {"workdir": DIR} of an earlier run, or {"folder": DIR} of transformers.
      cache: a folder for the teachers' outputs on the training examples. The first run computes them. Runs with the same
        teachers (at the same paths), data, `dtype`, `cache_dtype` and outputs that the losses read share them; any other run is
        refused and needs another folder. "" computes the outputs anew in each step.
      cache_dtype: dtype of the cached outputs, float16 or float32; outputs above 65504, such as those of MobileBERT's
        layers, need float32.
    """

    teachers: tuple[dict, ...] = ()
    cache: OptionalPath = ""
    cache_dtype: Literal["float16", "float32"] = "float16"


class TeacherOutputs:
    """Supplies the teachers' outputs to the training step; this base class is for a run without teachers.

    Attributes:
      teach: called in the training step as teach(*step_arguments, batch); returns a tuple with one dict {output name:
        array [b, ...]} per teacher. None without teachers.
      step_arguments: what the step gets as extra arguments: (the teachers' variables on the devices,) if they run in the
        step, otherwise ().
    """

    teach: Callable | None = None
    step_arguments: tuple = ()

    def cached_outputs(self, batch: Mapping[str, np.ndarray]) -> tuple:
        """Returns the cached teacher outputs for a batch, on the devices: one dict per teacher; () if nothing is cached."""
        return ()

    def cached_shapes(self, batch: Mapping[str, Any]) -> tuple:
        """Returns the shapes of `cached_outputs` for a batch of arrays or shapes."""
        return ()


class ComputedOutputs(TeacherOutputs):
    """Runs the teachers in each training step; see `TeacherOutputs`."""

    def __init__(self, built, teach: Callable):
        """Reads the teachers' variables and places them on every device.

        Args:
          built: the experiment.
          teach: (variables, batch) → a tuple with one dict of outputs per teacher.

        Raises:
          UserError: a teacher's weights are missing, or its head's if a loss reads an output of the head.
        """
        replicated = sharding.replicated(built.mesh)
        # A folder without a head can still teach its hidden states: then any head will do.
        needs_head = HEAD_OUTPUTS & set(built.objective.wants)
        fresh = None if needs_head else jax.random.key(0)
        variables = tuple(teacher.read_variables(fresh) for teacher in built.teachers)
        self.step_arguments = (jax.device_put(variables, replicated),)
        self.teach = teach


class CachedOutputs(TeacherOutputs):
    """Reads the teachers' outputs from disk; the training step finds them as batch["teacher"]. See `TeacherOutputs`."""

    def __init__(self, caches: list[Cached], output_shapes: Callable, mesh):
        """Takes one cache per teacher.

        Args:
          caches: opened and complete.
          output_shapes: batch of arrays or shapes → shapes of the outputs, one dict per teacher.
          mesh: the devices that the outputs are distributed over.
        """
        self._caches, self.cached_shapes, self._mesh = caches, output_shapes, mesh

    def cached_outputs(self, batch):
        """Reads the outputs for the examples of a batch; returns one dict {output name: float32 [b, ...]} per teacher.

        The arrays lie on the devices. Sequences have the length of the batch.
        """
        outputs = tuple(
            cache.rows(batch["index"], shapes)
            for cache, shapes in zip(
                self._caches, self.cached_shapes(batch), strict=True
            )
        )
        over_batch = sharding.over_batch(self._mesh)
        return jax.tree.map(
            lambda rows: jax.device_put(rows.astype(np.float32), over_batch), outputs
        )

    @staticmethod
    def teach(batch):
        """Returns the result of `cached_outputs`, which the training loop has added to the batch as "teacher"."""
        return batch["teacher"]


def check_cache(distill: Settings, data: Data) -> None:
    """Raises a UserError if `config.distill.cache` is set, but the teachers' outputs cannot be cached.

    That is so without teachers, with training examples that vary between epochs, and with several processes.
    """
    if not distill.cache:
        return
    if not distill.teachers:
        raise UserError(
            "config.distill.cache has no effect without config.distill.teachers: leave the key out"
        )
    if not data.fixed:
        raise UserError(
            "config.distill.cache cannot be used: training examples change from epoch to epoch, and the teachers' outputs"
            " with them; leave the key out, or config.data's random changes"
        )
    if jax.process_count() > 1:
        raise UserError(
            "config.distill.cache is written and read by one process: leave the key out, or --coordinator and --processes"
        )


@contextlib.contextmanager
def open_outputs(built, say: Callable[[str], None]) -> Iterator[TeacherOutputs]:
    """Opens the outputs of an experiment's teachers for training; fills an incomplete cache first.

    If a loss reads logits and the data name their classes, a line tells which teachers do not name theirs. Another line tells
    which teachers' logits have another meaning, such as several labels in place of one class.

    Args:
      built: the experiment.
      say: prints a line.

    Raises:
      UserError: a teacher's weights are missing or do not fit; a cache holds the outputs of another teacher or of other data,
        other outputs, or outputs of another dtype; the disk has too little space for a cache; or `cache_dtype` cannot hold
        an output.
    """
    if not built.teachers:
        yield TeacherOutputs()
        return
    networks = [teacher.network for teacher in built.teachers]
    wants = built.objective.wants
    for teacher in built.teachers if "logits" in wants else ():
        if teacher.class_names is None and built.data.label_names:
            say(_classes.unnamed_classes_line(teacher.location))
        if line := _classes.other_problem_line(
            teacher.location, teacher.problem_type, built.data
        ):
            say(line)
    teach = _objective.teacher_function(networks, wants, built.data.inputs)
    computed = ComputedOutputs(built, teach)
    if not built.distill.cache:
        yield computed
        return
    output_shapes = _output_shapes(built, [n.model for n in networks], wants)
    with contextlib.ExitStack() as stack:
        example_shapes = output_shapes(built.data.specs(1)[-1])
        caches = _open_caches(built, example_shapes, computed.step_arguments[0])
        for cache in caches:
            stack.enter_context(cache)
        _fill_caches(built, caches, computed, say)
        del computed  # frees the teachers' memory
        yield CachedOutputs(caches, output_shapes, built.mesh)


def _output_shapes(built, nets, wants) -> Callable:
    """Returns a function from a batch of arrays or shapes to the shapes of the teachers' outputs, one dict per teacher.

    Args:
      built: the experiment.
      nets: the teachers' modules.
      wants: names of the outputs that losses read.
    """
    names = tuple(built.data.exported)

    @functools.cache
    def shapes_for(batch_shapes):
        x = jax.eval_shape(
            built.data.inputs, dict(zip(names, batch_shapes, strict=True))
        )
        outputs = [_objective.output_shapes(net, x) for net in nets]
        wanted = tuple({k: o[k] for k in wants if k in o} for o in outputs)
        # Cached outputs are read as float32, whatever dtype the teachers compute in.
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32), wanted)

    def output_shapes(batch):
        batch_shapes = (
            jax.ShapeDtypeStruct(batch[k].shape, batch[k].dtype) for k in names
        )
        return shapes_for(tuple(batch_shapes))

    return output_shapes


def _open_caches(built, example_shapes, variables) -> list[Cached]:
    """Opens one cache per teacher for writing.

    Each cache has a fingerprint of the teacher's weights and network and of the data, so that another teacher or other
    data are refused.

    Args:
      built: the experiment.
      example_shapes: shapes of each teacher's outputs for a batch of one example.
      variables: of each teacher.
    """
    caches = []
    data = f"data {_checksum([repr(_sorted_keys(built.experiment.data)).encode()])}"
    data += f" {_sample_checksum(built.data)}"
    for number, (shapes, own) in enumerate(zip(example_shapes, variables, strict=True)):
        teacher = built.teachers[number]
        network, location = teacher.network, teacher.location
        leaves = map(np.ascontiguousarray, jax.tree.leaves(jax.device_get(own)))
        architecture = repr(network.model) + network.dtype
        row_shapes = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes
        )
        fingerprint = f"{location}, weights {_checksum(leaves)}, network {_checksum([architecture.encode()])}, {data}"
        folder, dtype = f"{built.distill.cache}/{number}", built.distill.cache_dtype
        caches.append(
            Cached.write(folder, row_shapes, built.data.num_train, fingerprint, dtype)
        )
    return caches


def _sample_checksum(data: Data) -> str:
    """Returns a checksum of some training examples, because files may change under the same settings."""
    rows = min(FINGERPRINT_EXAMPLES, data.num_train)
    with contextlib.closing(data.train(rows, 0)) as batches:
        batch = next(batches)
    return _checksum(np.ascontiguousarray(batch[k]) for k in sorted(batch))


def _checksum(buffers: Iterable) -> str:
    """Returns the CRC-32 of all these bytes and arrays in turn, as 8 hexadecimal digits."""
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return f"{crc:08x}"


def _sorted_keys(section):
    """Returns a config section as nested lists of (key, value), the same for every order of its keys."""
    if isinstance(section, Mapping):
        return [(key, _sorted_keys(section[key])) for key in sorted(section)]
    return section


def _fill_caches(
    built, caches, computed: ComputedOutputs, say: Callable[[str], None]
) -> None:
    """Computes the outputs that the caches lack and writes them.

    It reads the examples in the order of training, whose first epoch has each example once.

    Args:
      built: the experiment.
      caches: one per teacher, open for writing.
      computed: runs the teachers.
      say: prints a line of progress.
    """
    if all(cache.complete for cache in caches):
        return
    e, data = built.experiment, built.data
    names = tuple(data.exported)
    teach = jax.jit(computed.teach)
    start = last_line = time.monotonic()
    with contextlib.closing(data.train(e.batch, e.seed)) as batches:
        for number, batch in enumerate(batches):
            if all(cache.complete for cache in caches):
                break
            if not any(cache.lacks(batch["index"]) for cache in caches):
                continue  # an earlier run that was stopped has written this batch
            arrays = sharding.put_batch({k: batch[k] for k in names}, built.mesh)
            outputs = jax.device_get(teach(*computed.step_arguments, arrays))
            for cache, teacher_outputs in zip(caches, outputs, strict=True):
                cache.put(batch["index"], teacher_outputs)
            now = time.monotonic()
            if now - last_line > PROGRESS_SECONDS:
                last_line, done = now, min((number + 1) * e.batch, data.num_train)
                say(f"teachers   {done:,} of {data.num_train:,} examples")
    for cache in caches:
        cache.flush()
    say(
        f"teachers   {data.num_train:,} examples in {built.distill.cache}, {time.monotonic() - start:.0f} s"
    )


def make_teacher(
    section: Mapping[str, Any],
    source: Data,
    where: str,
    dtype: str = "float32",
    outputs: int | None = None,
) -> Teacher:
    """Builds the teacher that one entry of `config.distill.teachers` names. Its weights are not read yet.

    Teacher and student see the same batches, so the teacher must read the student's data as they are. If both have the same
    classes in another order, the teacher's logits are put into the order of the data.

    Args:
      section: {"folder": DIR} for a folder of `transformers`, or {"workdir": DIR} for an earlier run.
      source: the student's data. Their task and classes are the defaults for a folder, which need not have a head.
      where: the section's name in the config, for error messages.
      dtype: the dtype of the teacher's computation.
      outputs: the student's number of classes, if the config sets more than the data have.

    Raises:
      UserError: the section has other keys; there is no network in the folder or work directory; the network reads images
        and the data are texts, or the other way round; it was trained with another normalisation of images, which only a
        work directory with config.json tells; its embedding table does not fit the number of the data's tokens (the tokens
        themselves are not compared); it has as many classes as the data, with other names; or it replaces tokens itself, as
        ELECTRA's pretraining network does.
    """
    if not isinstance(section, Mapping):
        raise UserError(
            f'{where} = {section!r} should be {{"workdir": DIR}} or {{"folder": DIR}}'
        )
    registry.check(_pretrained.find_network, section, where, given=("where",))
    network = _pretrained.pretrained_part(
        _pretrained.find_network(**section, where=where), source.model.get("task")
    )
    name = network.options["name"]
    module = registry.load("squeeze_jax.models", name, "model")
    if (inputs := getattr(module, "INPUTS", "images")) != source.reads:
        raise UserError(
            f"{where} = {network.location} holds {name!r}, which reads {inputs}, but config.data gives {source.reads}: choose"
            f" a teacher of {source.reads}"
        )
    if hasattr(module, "fine_tuned"):
        raise UserError(
            f"{where} = {network.location}: {name!r} draws tokens of its own, so its outputs do not belong to the student's"
            " tokens: choose another teacher"
        )
    _check_normalisation(section, source, where)
    options = {**source.model, **network.options}
    net = models.make(**options)
    positions = _class_positions(network, options, source, outputs)
    vocabulary_size = getattr(source, "vocabulary", None)
    if vocabulary_size is not None and not _pretrained.vocabulary_fits(
        net, vocabulary_size
    ):
        raise UserError(
            f"the tokenizer has {vocabulary_size:,} tokens, {where} = {network.location} {net.row.vocabulary:,}: student and"
            " teacher need the same"
        )
    remedy = "choose a teacher of the same tokenizer"
    _classes.check_same_tokens(network.tokens, source, network.location, remedy)
    if positions is not None:
        net = _classes.ReorderedClasses(net, positions)
    teacher = network.with_forward_methods(net, source.example(), dtype)
    return Teacher(
        teacher,
        lambda fresh: network.read_variables(options, fresh)[0],
        network.location,
        network.class_names,
        network.problem_type,
    )


def _class_positions(network, options, source, outputs) -> tuple[int, ...] | None:
    """Returns the position of each of the data's classes among the outputs of a teacher's head.

    Returns None if the order is the same or unknown, or if the teacher has another number of classes.

    Args:
      network: the teacher.
      options: the arguments of `models.make` that build it.
      source: the student's data.
      outputs: the student's number of classes; None if it has none.

    Raises:
      OtherClasses: the teacher has as many classes, but with other names.
    """
    of_teacher = options.get("num_classes")
    if of_teacher not in (outputs, source.model.get("num_classes")):
        return None
    remedy = "choose a teacher of the same classes"
    return _classes.class_positions(
        network.class_names,
        source.label_names,
        network.location,
        remedy,
        of_teacher or 0,
    )


def _check_normalisation(section: Mapping[str, Any], source: Data, where: str) -> None:
    """Raises a UserError if a teacher's run normalised images with another mean or std than the student's data do.

    Args:
      section: the teacher's section of the config.
      source: the student's data.
      where: the section's name, for error messages.
    """
    path = pathlib.Path(section.get("workdir", "")) / "config.json"
    if source.reads != "images" or "workdir" not in section or not path.is_file():
        return
    try:
        teacher_data = files.read_json(path)["data"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: run the job fit there again") from None
    parameters = inspect.signature(images.make).parameters
    for key in "mean", "std":
        theirs = teacher_data.get(key, parameters[key].default)
        ours = getattr(source, key)
        if not np.array_equal(*np.broadcast_arrays(theirs, ours)):
            theirs = tuple(theirs) if np.ndim(theirs) else theirs
            raise UserError(
                f"{where}.workdir = {section['workdir']!r} was trained with config.data.{key} = {theirs}, and a teacher"
                f" sees what the student sees: set the key to that, not {ours}"
            )
