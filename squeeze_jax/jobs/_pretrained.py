"""Finds trained networks and takes weights from them: for `config.init`, for teachers and for `sj.load`.

A trained network is a folder of `transformers`, the work directory of an earlier run, or a file of weights. Some networks
serve pretraining only, such as ELECTRA's generator and discriminator. Their model file has `fine_tuned(options)`, which
returns the `models.make` options of the part to fine-tune, and a function from the whole network's variables to the part's.
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
from squeeze_jax.data import Data
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _classes, _model_json, _plugs
from squeeze_jax.models import _folder
from squeeze_jax.ranges import Layers, OptionalPath
from squeeze_jax.train import forward
from squeeze_jax.train.checkpoint import Checkpoints
from squeeze_jax.weights import foreign, pretrained

_LAYER_NAME = re.compile(r"^layer(\d+)/")
CLASSIFIER_LAYER = "head/classifier"  # of an encoder: its outputs are the classes
# Published checkpoints pad their embedding table to a multiple of up to 128 rows, so it has at most this many rows more than
# the vocabulary has tokens.
_MAX_PADDING_ROWS = 127


class PretrainedNetwork(NamedTuple):
    """A trained network: how it is built, and how its weights are read.

    Attributes:
      options: the arguments of `models.make` that build it. Those of a folder lack `task` and `num_classes`: callers add
        them, because `models.make` would take its own defaults, and `read_variables` the folder's values.
      read_variables: (options, fresh) → (variables, fresh layers): reads the weights into the network that `models.make`
        builds of the options, see `_folder_reader`. The variables are numpy arrays for `forward.run`. Only the reader of a
        folder of `transformers` uses the arguments, because it alone initialises layers; the others return () for the
        fresh layers. The reader of a file prints what it converts and leaves out. If the file has no classifier, or one for
        other classes, the variables lack it, and the caller initialises it.
      location: the folder, work directory or file, as error messages name it.
      forward_sections: the sections of `config.forward` that the network was trained with.
      first_step: the step at which its last training phase began; the methods of `config.forward` count from it.
      class_names: names of the classes in the order of the head's outputs; None if they are unknown, () for a run whose data
        name no classes.
      tokens: the digest of the tokens and of their ids; None if they are unknown, and for images.
      problem_type: how a folder's classifier was trained, see `_classes.problem_type`; "" if it is unknown.
    """

    options: dict[str, Any]
    read_variables: Callable[
        [dict[str, Any], jax.Array | None], tuple[dict[str, Any], tuple[str, ...]]
    ]
    location: str
    forward_sections: tuple = ()
    first_step: int = 0
    class_names: tuple[str, ...] | None = None
    tokens: str | None = None
    problem_type: str = ""

    def with_forward_methods(
        self, model: nn.Module, example: Any, dtype: str
    ) -> forward.Network:
        """Returns a module together with the methods of `config.forward` that this network was trained with.

        Args:
          model: the module, such as `models.make(**self.options)`.
          example: shapes of the module's inputs. Any dtype but float32 needs them, to find the normalisation layers; None is
            enough for float32.
          dtype: the dtype of the computation.

        Raises:
          UserError: a method of `forward_sections` cannot be made, or `dtype` is no floating-point dtype.
        """
        methods = _plugs.make_forward_methods(self.forward_sections, set())
        return forward.make(
            model, example, forwards=methods, dtype=dtype, first=self.first_step
        )

    def plain_variables(
        self, options: Mapping[str, Any], fresh: jax.Array | None
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Reads the weights and applies the methods that change weights, such as pruning masks.

        Leaves out the methods that change activations, and the parameters that methods own.

        Args:
          options, fresh: see `_folder_reader`.

        Returns:
          ({"params", "batch_stats"} of numpy arrays, the layers that were initialised). A folder of `transformers` has no
          "batch_stats".

        Raises:
          UserError: the weights are missing, damaged or do not fit; or a method of `forward_sections` cannot be made.
        """
        variables, fresh_layers = self.read_variables(options, fresh)
        if not self.forward_sections:
            kept = ("params", "batch_stats")
            plain = {k: variables[k] for k in kept if k in variables}
            plain["params"] = forward.parameters(plain["params"])
            return plain, fresh_layers
        network = self.with_forward_methods(models.make(**options), None, "float32")
        network, variables = forward.fold_reparametrizations(network, variables)
        params = forward.parameters(variables["params"])
        stats = variables["batch_stats"]
        plain = jax.device_get({"params": params, "batch_stats": stats})
        return plain, fresh_layers

    @property
    def description(self) -> str:
        """Returns the location, and the names of the methods of `config.forward` that the network runs with."""
        if not self.forward_sections:
            return self.location
        names = ", ".join(section["name"] for section in self.forward_sections)
        return f"{self.location}, its weights as {names} left them"


def find_network(
    folder: OptionalPath = "", workdir: OptionalPath = "", *, where: str
) -> PretrainedNetwork:
    """Finds a trained network in a folder or a work directory. Its weights are not read yet.

    Args:
      folder: a folder as `transformers` writes it: config.json beside model.safetensors or pytorch_model.bin. Without
        weights it is an error of `read_variables` only.
      workdir: the work directory of a run of this project.
      where: the config section that names the network, for error messages.

    Raises:
      UserError: both `folder` and `workdir` are set, or neither is; the folder has no config.json, or one of an unknown
        architecture; the work directory has neither `model.json` nor a readable checkpoint, or its `model.json` is damaged
        and no checkpoint replaces it. A run that stopped before its first checkpoint is an error of `read_variables` only.
    """
    if bool(folder) == bool(workdir):
        raise UserError(
            f"{where} should name a folder of transformers or a workdir of an earlier run, one of them"
        )
    if folder:
        if _is_workdir(folder):
            raise UserError(
                f"{where}.folder = {folder!r} is the work directory of a run: write {where}.workdir"
            )
        options, class_names = models.options(folder), models.class_names(folder)
        read_variables = _folder_reader(folder)
        return PretrainedNetwork(
            options,
            read_variables,
            folder,
            class_names=class_names,
            problem_type=_folder.problem_type(folder),
        )
    saved_model = _model_json.read(pathlib.Path(workdir))
    if saved_model is None:
        has_weights = any(
            path
            for pattern in ("*.safetensors", "pytorch_model*.bin")
            for path in pathlib.Path(workdir).glob(pattern)
        )
        advice = (
            f"it is a folder of transformers, write {where}.folder"
            if has_weights
            else "train one there first"
        )
        raise UserError(
            f"{where}.workdir = {workdir!r} holds no trained network (no {_model_json.NAME}): {advice}"
        )
    checkpoint_settings = saved_model["checkpoint"]
    note = _model_json.checkpoint_note(pathlib.Path(workdir), **checkpoint_settings)
    return PretrainedNetwork(
        _checkpoint_options(note, saved_model),
        lambda options, fresh: (read_checkpoint(workdir, **checkpoint_settings), ()),
        workdir,
        note.get("forward", ()),
        note.get("first", 0),
        saved_model.get("classes"),
        saved_model.get("tokens"),
    )


def _is_workdir(folder: str) -> bool:
    """Returns whether a folder is the work directory of a run that has trained a network."""
    path = pathlib.Path(folder)
    return (path / _model_json.NAME).is_file() or any(
        (path / "checkpoints").glob("[0-9]*")
    )


def network_from_init(
    folder: OptionalPath = "",
    workdir: OptionalPath = "",
    file: OptionalPath = "",
    names: pretrained.Names = "squeeze_jax",
    under: str = "",
    key: str = "",
    only: str = "",
    layers: tuple[Layers, ...] = (),
) -> PretrainedNetwork | None:
    """Checks the section `config.init` and returns the trained network that it names. The parameters are the section's keys.

    A file of weights does not say which network it belongs to. For a file the result is None, and `network_from_file` returns
    the network of `config.model`. `only` and `layers` are checked here; `initial_variables` applies them.

    Args:
      folder: a folder of `transformers` to begin with: config.json beside model.safetensors or pytorch_model.bin.
      workdir: the work directory of an earlier run to begin with.
      file: a file of weights for the network that `config.model` names: .safetensors, .pth, .pt, .bin, .npz, .h5 or .keras.
      names: the project whose parameter names the file uses: torchvision, timm, keras, caffe, released (by a paper's
        authors) or squeeze_jax.
      under: the prefix of the network's names in the file, such as "backbone"; arrays with other names are left out; "" for
        none.
      key: the entry of a PyTorch checkpoint that holds the weights, such as "model_ema"; "" for the first that fits.
      only: a regular expression; takes the parameters whose names it matches, and initialises the others; "" takes all.
      layers: layers of the trained network to take, counted from 1, as layers 1, 2, ... of the new one; () takes all.

    Returns:
      The network, whose weights are not read yet; None for a file.

    Raises:
      UserError: not exactly one of `folder`, `workdir` and `file` is set; the folder or work directory holds no network; a
        key of files is set without a file; a layer is below 1; or `only` is no regular expression.
    """
    if file and (folder or workdir):
        raise UserError(
            "config.init should name a file of weights, a folder of transformers or a workdir of an earlier run, one of them"
        )
    file_keys = {"under": under, "key": key, "names": names != "squeeze_jax"}
    if unused := [name for name, value in file_keys.items() if value and not file]:
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
    return None if file else find_network(folder, workdir, where="config.init")


def network_from_file(
    options: Mapping[str, Any],
    example: Any,
    file: str,
    names: str = "squeeze_jax",
    under: str = "",
    key: str = "",
    *,
    needed: bool = True,
) -> PretrainedNetwork:
    """Returns the network of `config.model`, which gets its weights from a file. The file is not read yet.

    `read_variables` of the result prints what it converts and leaves out.

    Args:
      options: the arguments of `models.make` that build the network.
      example: shapes of the network's inputs.
      file: the path of the file.
      names, under, key: keys of the section `config.init`, see `network_from_init`.
      needed: whether a missing file is an error; a run that continues from a checkpoint does not read the file again.

    Raises:
      UserError: the network has no map from the names in the file to its parameters, or its options make it compute
        something else than the network that the weights were trained for. If `needed`, also: the file does not exist or has
        an unknown ending, or `key` is given for a file that is not PyTorch's.
    """
    module = registry.load("squeeze_jax.models", options["name"], "model")
    net = models.make(**options)
    pretrained.check(file, names, options["name"], module, net, key=key, needed=needed)

    def read_variables(*_):
        shapes = jax.eval_shape(
            lambda x: net.init(jax.random.key(0), x, train=False), example
        )
        variables, lines = pretrained.load(
            file, names, net, module, shapes, under=under, key=key
        )
        for line in lines:
            print(f"weights    {line}")
        return variables, ()

    return PretrainedNetwork(dict(options), read_variables, file)


def pretrained_part(
    network: PretrainedNetwork, task: str | None, name: str | None = None
) -> PretrainedNetwork:
    """Returns the part of a pretrained network that a run begins with, or the whole network if the run continues it.

    Some networks exist for pretraining only. `electra_pretraining`, for example, consists of a generator and a discriminator,
    of which fine-tuning needs the discriminator alone. The model file of such a network has a function `fine_tuned`, which
    says how to build the part and how to take its variables from those of the whole.

    The whole network is returned if its model file has no `fine_tuned`, or if the run continues the pretraining: `name` is the
    network's own name, or `name` is None and the data have the network's task.

    Args:
      network: the pretrained network.
      task: the task of the data, such as "classification"; None if they have none.
      name: `config.model.name`; None if the config does not name a model.

    Returns:
      The network to begin with. The methods that the whole network was trained with are already applied to a part's weights,
      and its classes are not known.
    """
    pretrained_name = network.options["name"]
    make_options = {k: v for k, v in network.options.items() if k != "name"}
    module = registry.load("squeeze_jax.models", pretrained_name, "model")
    if not hasattr(module, "fine_tuned") or name == pretrained_name:
        return network
    if name is None and task == models.make(**network.options).task:
        return network
    part_options, part_of = module.fine_tuned(make_options)
    return PretrainedNetwork(
        part_options,
        lambda options, fresh: (
            part_of(network.plain_variables(network.options, fresh)[0]),
            (),
        ),
        network.location,
        tokens=network.tokens,
    )


def _folder_reader(folder):
    """Returns the function `read_variables` of a `PretrainedNetwork` for a folder of `transformers`.

    The function takes two arguments and returns (variables, names of the layers that were initialised). Its arguments are

    - options: the arguments of `models.make` for the network that gets the weights. Its head may be for another task or for
      another number of classes than the one in the folder.
    - fresh: a key from `jax.random.key` that initialises the layers of this head which the folder lacks or has for another
      number of classes. With None they are a UserError.
    """

    def read_variables(options, fresh):
        options = {k: v for k, v in options.items() if k != "name"}
        task = options.pop("task", None)
        return _folder.load_and_list_fresh(folder, task, fresh, options)[1:]

    return read_variables


def read_checkpoint(workdir: str, **checkpoint_settings) -> dict[str, Any]:
    """Reads the variables of a run's trained network from its checkpoint, as numpy arrays.

    Args:
      workdir: the run's work directory.
      **checkpoint_settings: arguments of `Checkpoints`; they select the newest or the best checkpoint.

    Returns:
      The variables for `forward.run`: {"params", "batch_stats", "step"}, and "extra" if methods have state. They hold the
      averaged weights if the run averages its weights.

    Raises:
      UserError: there is no checkpoint, or it cannot be read; or the settings ask for the best checkpoint, and none was
        evaluated.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    if directory.is_dir():
        opened = Checkpoints(directory, **checkpoint_settings, read_only=True)
        with contextlib.closing(opened) as checkpoints:
            variables = checkpoints.trained_variables()
        if variables is not None:
            return variables
        if steps := sorted(
            int(p.name) for p in directory.iterdir() if p.name.isdigit()
        ):
            raise UserError(
                f"no checkpoint in {directory} can be read, of {', '.join(map(str, steps))}: they are damaged; take another"
                " work directory"
            )
    raise UserError(f"no checkpoint in {workdir}: train there first")


def _checkpoint_options(
    note: Mapping[str, Any], saved_model: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the options of `models.make` for a checkpoint's network.

    In a run of several phases each checkpoint has options of its own, because a phase may change the network.

    Args:
      note: the checkpoint's note.
      saved_model: the contents of the run's `model.json`.
    """
    phased = note.get("config", {}).get("phases")
    return note["options"] if phased else saved_model["model"]


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Returns whether a work directory has the folder of a finished checkpoint; a damaged one counts, too."""
    folders = (workdir / "checkpoints").glob("[0-9]*")
    # An unfinished checkpoint has a name such as "2.orbax-checkpoint-tmp".
    return any(folder.name.isdecimal() for folder in folders)


def config_without_training(
    workdir: pathlib.Path, config: Mapping[str, Any]
) -> tuple[dict[str, Any], int, dict[str, Any] | None]:
    """Removes the keys that only training reads from a run's config, and makes it name the trained network.

    The removed keys are `init`, `distill`, `objective`, `update`, `gradients` and `exchange`, and the optimizer's rules
    `freeze` and `decay_rules`, also those of the phases. `forward` stays, because it belongs to the network.

    Args:
      workdir: the run's work directory.
      config: the run's config.

    Returns:
      A tuple of the reduced config, in which "model" holds the options of the trained network; the index of the phase that
      this network comes from; and its options. If there is neither `model.json` nor a readable checkpoint: the config as it
      is, 0 and None.

    Raises:
      UserError: `model.json` is damaged, and no checkpoint has its contents.
    """
    saved_model, reduced = _model_json.read(workdir), dict(config)
    if saved_model is None:
        return reduced, 0, None
    checkpoint_settings = saved_model["checkpoint"] | config.get("checkpoint", {})
    note = _model_json.checkpoint_note(workdir, **checkpoint_settings)
    options, phase = _checkpoint_options(note, saved_model), note.get("phase", 0)
    for key in "init", "distill":
        reduced.pop(key, None)
    reduced = _without_training_keys(reduced) | {"model": options}
    if reduced.get("phases"):
        reduced["phases"] = tuple(_without_training_keys(p) for p in reduced["phases"])
    return reduced, phase, options


def _without_training_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """Removes the training methods and the optimizer's parameter rules from a config or from one of its phases."""
    training = ("objective", "update", "gradients", "exchange")
    kept = {k: v for k, v in section.items() if k not in training}
    if "optim" in kept:  # its rules may name parameters that only a loss owns
        rules = ("freeze", "decay_rules")
        kept["optim"] = {k: v for k, v in kept["optim"].items() if k not in rules}
    return kept


def initial_variables(
    network: PretrainedNetwork,
    options: Mapping[str, Any],
    shapes: Mapping[str, Any],
    fresh: jax.Array,
    *,
    only: str = "",
    layers: tuple[int, ...] = (),
    classes: Sequence[str] = (),
    example: Any = None,
    source: Data | None = None,
) -> dict[str, Any]:
    """Returns the variables that a new network takes from a trained one, and prints what happens to the classifier.

    Parameters of the head (see `head_prefixes`) need not fit: what the trained network has for another task, with another
    shape or not at all begins anew. The result lacks such a parameter, and the caller initialises it; only the layers that a
    folder of `transformers` lacks are initialised here, by `fresh`. All other parameters have to fit.

    Args:
      network: the trained network.
      options: the arguments of `models.make` that build the new network.
      shapes: {"params", "batch_stats"} of the new network, as `jax.ShapeDtypeStruct`s.
      fresh: a key from `jax.random.key`.
      only: a regular expression; takes only the parameters whose names it matches; "" takes all.
      layers: the trained network's layers to take, counted from 1, as layers 1, 2, ... of the new network; () takes all.
      classes: names of the data's classes; a trained head for the same classes is put into their order.
      example: shapes of the new network's inputs; needed to reorder the classes.
      source: the data; a line tells if the trained head's outputs have another meaning. None for no line.

    Returns:
      {"params", "batch_stats"}, numpy arrays in the dtypes of `shapes`; some leaves may be left out.

    Raises:
      UserError: the weights are missing, damaged or do not fit `network` itself; a parameter outside the head is missing or
        has another shape (names the first); `only` matches no parameter; the trained network has no layer of a number in
        `layers`; or its head has as many classes as the data, but others.
    """
    takes_all = not only and not layers
    pretrained_variables, fresh_layers = network.plain_variables(
        {**network.options, **options} if takes_all else network.options, fresh
    )
    if network.options.get("task", options.get("task")) != options.get("task"):
        # The layers of two tasks' heads may have the same names.
        pretrained_variables = {
            collection: _without_head(values, options["name"])
            for collection, values in pretrained_variables.items()
        }
    if layers:
        _check_layers(pretrained_variables["params"], layers, network.location)
        pretrained_variables = {
            collection: _selected_layers(values, layers)
            for collection, values in pretrained_variables.items()
        }
    params = pretrained_variables["params"]
    head = head_prefixes(options["name"])
    trained_head = CLASSIFIER_LAYER not in fresh_layers
    names = [n for n in tree.flatten(shapes["params"]) if n.startswith(head)]
    if not head and classes:  # the network's file does not name its head
        names = _classes.class_arrays(options, example)
    if trained_head and _takes_all(params, shapes["params"], names, only):
        if source is not None and (
            line := _classes.other_problem_line(
                network.location, network.problem_type, source
            )
        ):
            print(line)
        params = _match_class_order(network, params, options, classes, example)
    pretrained_variables = pretrained_variables | {"params": params}
    initial, problems = {}, []
    for collection, collection_shapes in shapes.items():
        available = tree.flatten(pretrained_variables.get(collection, {}))
        expected = tree.flatten(collection_shapes)
        names = [n for n in expected if re.search(only, n)] if only else list(expected)
        if only and collection == "params" and not names:
            raise UserError(
                f"config.init.only = {only!r} matches no parameter; there is {next(iter(expected))}, for example"
            )
        taken = {}
        for name in names:
            array = available.get(name)
            if array is not None and np.shape(array) == expected[name].shape:
                taken[name] = np.asarray(array, expected[name].dtype)
            elif not name.startswith(head):
                problems.append(
                    f"{name} {expected[name].shape} is not there"
                    if array is None
                    else f"{name} is {np.shape(array)}, should be {expected[name].shape}"
                )
        initial[collection] = traverse_util.unflatten_dict(taken, sep="/")
    if problems:
        module = registry.load("squeeze_jax.models", options["name"], "model")
        advice = "or take only what fits by config.init.only, a regular expression over names"
        raise foreign.misfit(
            network.location, problems, f"{foreign.advice_for(module)}, {advice}"
        )
    left_out = tree.flatten(shapes["params"]).keys() - tree.flatten(initial["params"])
    fresh_layers = {*fresh_layers, *(name.rpartition("/")[0] for name in left_out)}
    # `only` asks for this, and the reader of a file, whose network is that of the config, has said it.
    if fresh_layers and not only and network.options != dict(options):
        print(
            f"weights    {network.location} has no {', '.join(sorted(fresh_layers))} for this task and these classes:"
            " initialised anew"
        )
    return initial


def _takes_all(params, expected, names, only) -> bool:
    """Returns whether every head parameter that `only` selects is in `params` with the expected shape.

    Args:
      params: of the trained network.
      expected: shapes of the new network's parameters.
      names: of the head's parameters.
      only: see `initial_variables`.
    """
    available, shapes = tree.flatten(params), tree.flatten(expected)
    names = [n for n in names if not only or re.search(only, n)]
    return bool(names) and all(
        np.shape(available.get(n)) == shapes[n].shape for n in names
    )


def _match_class_order(network, params, options, classes, example):
    """Returns the trained network's parameters with the head's classes in the order of the data's, and prints the change.

    If the network does not name its classes, the order stays, and a line warns about it.

    Args:
      network, options, classes, example: see `initial_variables`.
      params: of the trained network.
    """
    if network.class_names is None and classes:
        print(_classes.unnamed_classes_line(network.location))
    remedy = "leave the head out by config.init.only, a regular expression over names"
    positions = _classes.class_positions(
        network.class_names,
        classes,
        network.location,
        remedy,
        options.get("num_classes", 0),
    )
    if positions is None:
        return params
    print(
        f"classes    the classifier of {network.location} is put into the order of the data"
    )
    return _classes.reorder_classifier(params, options, example, positions)


def head_prefixes(model: str) -> tuple[str, ...]:
    """Returns the prefixes of the names of the head's parameters, such as ("pooler/", "head/"); () for a network without one.

    The head depends on the task and the classes; so a network for other ones initialises it anew.

    Args:
      model: the name of a file of `models`, which declares them as CLASSIFIER.
    """
    return tuple(f"{layer}/" for layer in classifier_layers(model))


def classifier_layers(model: str) -> tuple[str, ...]:
    """Returns the layers that depend on the classes, which a network's file names; `model` is the file of `models`."""
    module = registry.load("squeeze_jax.models", model, "model")
    return tuple(getattr(module, "CLASSIFIER", ()))


def _without_head(values, model):
    """Returns one collection of variables without those of the head; `model` is the name of a file of `models`."""
    head = head_prefixes(model)
    return traverse_util.unflatten_dict(
        {k: v for k, v in tree.flatten(values).items() if not k.startswith(head)},
        sep="/",
    )


def _check_layers(params, layers, location) -> None:
    """Raises a UserError if a trained network lacks one of its layers "layer1", "layer2", ... with these numbers.

    Args:
      params: of the trained network.
      layers: numbers of the layers, from 1.
      location: the network's location, for the error message.
    """
    numbers = {int(m[1]) for m in map(_LAYER_NAME.match, tree.flatten(params)) if m}
    for layer in layers:
        if layer not in numbers:
            raise UserError(
                f"config.init.layers has {layer}: {location} has layers 1 to {max(numbers, default=0)}"
            )


def _selected_layers(values, layers):
    """Returns one collection of variables with only these layers, renumbered from 1 in the order of `layers`.

    Args:
      values: params, batch_stats or another collection of the trained network; it may lack layers without such variables.
      layers: numbers of the layers to keep, from 1.
    """
    others = {k: v for k, v in values.items() if not re.fullmatch(r"layer\d+", k)}
    return others | {
        f"layer{new}": values[f"layer{old}"]
        for new, old in enumerate(layers, 1)
        if f"layer{old}" in values
    }


def vocabulary_fits(net: nn.Module, vocabulary_size: int) -> bool:
    """Returns whether a network's embedding table has a row for each token of a vocabulary, and few rows more.

    Up to `_MAX_PADDING_ROWS` further rows are padding. A network without an embedding table fits every vocabulary.

    Args:
      net: the network.
      vocabulary_size: the number of tokens of the vocabulary.
    """
    rows = getattr(getattr(net, "row", None), "vocabulary", None)
    return rows is None or 0 <= rows - vocabulary_size <= _MAX_PADDING_ROWS
