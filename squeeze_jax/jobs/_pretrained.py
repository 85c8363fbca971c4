"""Trained networks to begin with or to learn from: folders of `transformers`, and work directories of earlier runs.

Of a network that was made for pretraining alone a part goes on: where the model's file has `fine_tuned(options)`, that
gives the part's options of `models.make` and a function from the whole network's variables to the part's.
"""

import contextlib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from squeeze_jax import models, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _classes, _noted, _plugs
from squeeze_jax.ranges import Layers, OptionalPath
from squeeze_jax.train import forward
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.weights import pretrained

LAYER = re.compile(r"^layer(\d+)/")


class Network(NamedTuple):
    """A trained network.

    Attributes:
      options: what `models.make` makes it of.
      read: (options, key) → variables of `forward.run`, numpy; parameters of a head that are missing are initialised by
        the key.
      where: how an error calls it.
      forwards: what changes it as it is run, sections of `config.forward`.
      first: the step at which its last phase began.
      classes: names of the classes of its head, by number; None where nothing names them.
    """

    options: dict[str, Any]
    read: Callable[[dict[str, Any], jax.Array | None], dict[str, Any]]
    where: str
    forwards: tuple = ()
    first: int = 0
    classes: tuple[str, ...] | None = None

    def as_run(self, model: nn.Module, example: Any, dtype: str) -> forward.Network:
        """Returns a module together with the methods that change how it is run."""
        changes = _plugs.forward_methods(self.forwards, set())
        return forward.make(
            model, example, forwards=changes, dtype=dtype, first=self.first
        )

    def plain(
        self, options: Mapping[str, Any], key: jax.Array | None
    ) -> dict[str, Any]:
        """Returns the weights that the network runs with: {"params", "batch_stats"}, numpy; interceptions are left out."""
        variables = self.read(options, key)
        if not self.forwards:
            return {
                k: variables[k] for k in ("params", "batch_stats") if k in variables
            }
        network = self.as_run(models.make(**options), None, "float32")
        network, variables = forward.fold_reparametrizations(network, variables)
        params = forward.parameters(variables["params"])
        stats = variables["batch_stats"]
        return jax.device_get({"params": params, "batch_stats": stats})

    @property
    def described(self) -> str:
        """Describes where the network is, and which methods changed its weights."""
        if not self.forwards:
            return self.where
        names = ", ".join(section["name"] for section in self.forwards)
        return f"{self.where}, its weights as {names} left them"


def find(
    folder: OptionalPath = "", workdir: OptionalPath = "", *, where: str
) -> Network:
    """Looks for a network, without reading its weights.

    Args:
      folder: one that `transformers` writes: config.json and model.safetensors or pytorch_model.bin.
      workdir: of a run of this project.
      where: the section of the config that names it.

    Raises:
      UserError: neither or both are given, or there is no network.
    """
    if bool(folder) == bool(workdir):
        raise UserError(
            f"{where} should name a folder of transformers or a workdir of an earlier run, one of them"
        )
    if folder:
        options, classes = models.options(folder), models.class_names(folder)
        return Network(options, _folder_reader(folder), folder, classes=classes)
    noted = _noted.read(pathlib.Path(workdir))
    if noted is None:
        raise UserError(
            f"{where}.workdir = {workdir!r} holds no trained network (no {_noted.MODEL}): train one there first"
        )
    settings = noted["checkpoint"]
    saved = _noted.of_checkpoint(pathlib.Path(workdir), **settings)
    return Network(
        _options(saved, noted),
        lambda options, key: checkpoint(workdir, **settings),
        workdir,
        saved.get("forward", ()),
        saved.get("first", 0),
        noted.get("classes"),
    )


def settings(
    folder: OptionalPath = "",
    workdir: OptionalPath = "",
    file: OptionalPath = "",
    names: pretrained.Names = "squeeze_jax",
    under: str = "",
    key: str = "",
    only: str = "",
    layers: tuple[Layers, ...] = (),
) -> Network | None:
    """The network of `config.init`, see `find` and `begin`; the parameters are its keys.

    Args:
      folder, workdir: see `find`.
      file: of weights, for the network that `config.model` names; see `weights/pretrained.py`.
      names: whose names the file has.
      under: what stands before each of them, such as "backbone".
      key: which part of a PyTorch checkpoint has the weights, such as "model_ema"; "" for the first that can.
      only, layers: see `begin`.

    Returns:
      None for a file: its network is the config's.
    """
    if file and (folder or workdir):
        raise UserError(
            "config.init should name a file of weights, a folder of transformers or a workdir of an earlier run, one of them"
        )
    changed = {"under": under, "key": key, "names": names != "squeeze_jax"}
    if unused := [name for name, value in changed.items() if value and not file]:
        raise UserError(
            f"config.init.{unused[0]} has no effect without config.init.file: leave it out"
        )
    for layer in layers:
        if layer < 1:
            raise UserError(f"config.init.layers has {layer}: layers count from 1")
    try:
        re.compile(only)
    except re.error as error:
        raise UserError(
            f"config.init.only = {only!r} is no regular expression ({error})"
        ) from None
    return None if file else find(folder, workdir, where="config.init")


def of_file(
    options: Mapping[str, Any],
    example: Any,
    file: str,
    names: str = "squeeze_jax",
    under: str = "",
    key: str = "",
    *,
    needed: bool = True,
) -> Network:
    """Returns the network that a config names, with the weights of a file.

    Args:
      options: of `models.make`.
      example: shapes of the network's inputs.
      file, names, under, key: see `settings`.
      needed: whether the file has to exist, see `pretrained.check`.

    Raises:
      UserError: no such file, names that the network has no map for, or options that its weights are not for.
    """
    module = registry.load("squeeze_jax.models", options["name"], "model")
    net = models.make(**options)
    pretrained.check(file, names, options["name"], module, net, key=key, needed=needed)

    def read(*_):
        shapes = jax.eval_shape(
            lambda x: net.init(jax.random.key(0), x, train=False), example
        )
        variables, lines = pretrained.load(
            file, names, net, module, shapes, under=under, key=key
        )
        for line in lines:
            print(f"weights    {line}")
        return variables

    return Network(dict(options), read, file)


def suited(network: Network, task: str | None, name: str | None = None) -> Network:
    """What of a network goes on: a part of it where its file of `models` says so, and neither task nor name is its own.

    Args:
      network: the trained one.
      task: what the data are for.
      name: of the model that the config asks for; None for the trained one's.
    """
    own, rest = network.options["name"], dict(network.options)
    module = registry.load("squeeze_jax.models", rest.pop("name"), "model")
    if not hasattr(module, "fine_tuned") or name == own:
        return network
    if name is None and task == models.make(**network.options).task:
        return network
    options, part = module.fine_tuned(rest)
    return Network(
        options, lambda _, key: part(network.plain(network.options, key)), network.where
    )


def _folder_reader(folder):
    def read(options, key):
        rest = {k: v for k, v in options.items() if k != "name"}
        return models.load(folder, fresh=key, **rest)[1]

    return read


def checkpoint(workdir: str, **settings) -> dict[str, Any]:
    """The variables of a run's trained network, numpy.

    Args:
      workdir: of the run.
      **settings: of `Checkpoints`, that say which it is.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    if directory.is_dir():
        opened = Checkpoints(directory, **settings, read_only=True)
        with contextlib.closing(opened) as checkpoints:
            found = checkpoints.trained_variables()
        if found is not None:
            return found
    raise UserError(f"no checkpoint in {workdir}: train there first")


def _options(saved: Mapping[str, Any], noted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the network options of a checkpoint; in a run of several phases each checkpoint has its own."""
    phased = saved.get("config", {}).get("phases")
    return saved["options"] if phased else noted["model"]


def begun(workdir: pathlib.Path) -> bool:
    """Whether a work directory has a checkpoint that a run would continue from."""
    return any((workdir / "checkpoints").glob("[0-9]*"))


def alone(
    workdir: pathlib.Path, config: Mapping[str, Any]
) -> tuple[dict[str, Any], int, dict[str, Any] | None]:
    """Reduces the config of a run that has begun to what its trained network needs.

    Args:
      workdir: of the run.
      config: as it was begun.

    Returns:
      The config without what only training needs, such as teachers; the phase that the trained network is of; its
      options, or None where no training has begun.
    """
    noted, rest = _noted.read(workdir), dict(config)
    if noted is None:
        return rest, 0, None
    settings = noted["checkpoint"] | config.get("checkpoint", {})
    saved = _noted.of_checkpoint(workdir, **settings)
    options, phase = _options(saved, noted), saved.get("phase", 0)
    for key in "init", "distill":
        rest.pop(key, None)
    rest = _without_training(rest) | {"model": options}
    if rest.get("phases"):
        rest["phases"] = tuple(_without_training(p) for p in rest["phases"])
    return rest, phase, options


def _without_training(section: Mapping[str, Any]) -> dict[str, Any]:
    training = ("objective", "update", "gradients", "exchange")
    rest = {k: v for k, v in section.items() if k not in training}
    if "optim" in rest:  # rules may be of what an objective alone has learned
        rules = ("freeze", "decay_rules")
        rest["optim"] = {k: v for k, v in rest["optim"].items() if k not in rules}
    return rest


def begin(
    network: Network,
    options: Mapping[str, Any],
    shapes: Mapping[str, Any],
    key: jax.Array,
    *,
    only: str = "",
    layers: tuple[int, ...] = (),
    classes: Sequence[str] = (),
    example: Any = None,
) -> dict[str, Any]:
    """The variables that a run begins with: of a trained network, where they fit; of another task's without its head.

    Args:
      network: the trained one.
      options: what the new network is made of.
      shapes: {"params", "batch_stats"} of the new network.
      key: for what of the head the trained network does not have.
      only: takes the parameters whose names this regular expression finds, and leaves the others as initialised.
      layers: takes these of the trained network's layers, counted from 1, as the first, second, …
      classes: names of the data's classes; a trained head for the same classes is put into their order.
      example: shapes of the network's inputs, for that.

    Raises:
      UserError: parameters are missing or of other shapes, but for the head's, or a head for as many other classes; names
        the first.
    """
    whole = not only and not layers
    given = network.plain(
        {**network.options, **options} if whole else network.options, key
    )
    if network.options.get("task", options.get("task")) != options.get("task"):
        # The layers of two tasks' heads may have the same names.
        given = given | {"params": _headless(given["params"], options["name"])}
    if layers:
        given = given | {"params": _chosen(given["params"], layers, network.where)}
    head, fitted = head_names(options["name"]), {}
    if _takes_head(given["params"], shapes["params"], head, only):
        given = given | {
            "params": _in_order(network, given["params"], options, classes, example)
        }
    for collection, wanted in shapes.items():
        have = tree.flatten(given.get(collection, {}))
        want = tree.flatten(wanted)
        names = [n for n in want if re.search(only, n)] if only else list(want)
        if only and collection == "params" and not names:
            raise UserError(
                f"config.init.only = {only!r} matches no parameter; there is {next(iter(want))}, for example"
            )
        taken = {}
        for name in names:
            array = have.get(name)
            if array is not None and np.shape(array) == want[name].shape:
                taken[name] = np.asarray(array, want[name].dtype)
            elif not name.startswith(head):
                found = "is not there" if array is None else f"is {np.shape(array)}"
                raise UserError(
                    f"{network.where} does not fit the model: {name} {found}, should be {want[name].shape}; take only"
                    " what fits by config.init.only, a regular expression over names"
                )
        fitted[collection] = traverse_util.unflatten_dict(taken, sep="/")
    return fitted


def _takes_head(given, wanted, head, only) -> bool:
    """Whether a run begins with the whole head of a trained network."""
    have, want = tree.flatten(given), tree.flatten(wanted)
    names = [n for n in want if n.startswith(head) and (not only or re.search(only, n))]
    return bool(names) and all(np.shape(have.get(n)) == want[n].shape for n in names)


def _in_order(network, params, options, classes, example):
    """Returns the parameters with the head's classes in the order of the data's."""
    if network.classes is None and classes:
        print(
            f"classes    {network.where} does not name its classes: its classifier is taken to be in the order of the data's"
        )
    remedy = "leave the head out by config.init.only, a regular expression over names"
    places = _classes.order(network.classes, classes, network.where, remedy)
    if places is None:
        return params
    print(
        f"classes    the classifier of {network.where} is put into the order of the data"
    )
    return _classes.reordered(params, options, example, places)


def head_names(model: str) -> tuple[str, ...]:
    """Returns the prefixes of the classifier's parameters, which a network for other classes initialises anew."""
    module = registry.load("squeeze_jax.models", model, "model")
    return tuple(f"{layer}/" for layer in getattr(module, "CLASSIFIER", ()))


def _headless(params, model):
    head = head_names(model)
    return traverse_util.unflatten_dict(
        {k: v for k, v in tree.flatten(params).items() if not k.startswith(head)},
        sep="/",
    )


def _chosen(params, layers, where):
    """Parameters with the chosen layers in place of all."""
    there = {int(m[1]) for m in map(LAYER.match, tree.flatten(params)) if m}
    for layer in layers:
        if layer not in there:
            raise UserError(
                f"config.init.layers has {layer}: {where} has layers 1 to {max(there, default=0)}"
            )
    kept = {k: v for k, v in params.items() if not re.fullmatch(r"layer\d+", k)}
    return kept | {f"layer{n}": params[f"layer{of}"] for n, of in enumerate(layers, 1)}


def reads(net: nn.Module, words: int) -> bool:
    """Whether a network's embedding is for so many tokens."""
    row = getattr(net, "row", None)
    # Published checkpoints pad their table to a multiple of 8 or 64 rows.
    return row is None or 0 <= row.vocabulary - words < 128
