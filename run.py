"""Runs an experiment: `python run.py --config=configs/x.py --workdir=DIR --config.steps=500`."""

import argparse
import ast
import collections.abc
import copy
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import signal
import sys
import typing
import warnings

DESCRIPTION = """\
Runs an experiment from a config to a trained network to files that run on devices.

  python run.py                                        the main job on the digits: train, evaluate, export, measure
  python run.py --config=configs/squeezenet_cifar10.py --workdir=DIR --config.steps=500
  python run.py --job=evaluate --workdir=DIR           one part again, from the work directory
  python run.py --job=predict --workdir=DIR PHOTO.jpg FOLDER       labels of images; of a text, "A SENTENCE."
  python run.py --job=seeds --config=configs/glue_minilm.py --config.seeds='(0, 1, 2)'      the best of several
  python run.py --job=export --help                    what a job does, and its settings

Stop it with Ctrl-C at any time; the same command continues where it was."""


def parse(argv):
    """Returns the arguments of the command line, and the overrides of config keys among them."""
    from squeeze_jax import stop
    from squeeze_jax.errors import UserError, nearest

    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    parser.add_argument(
        "-h",
        "--help",
        action="store_true",
        help="print this, or with --job=NAME the settings of a job",
    )
    parser.add_argument(
        "--list",
        nargs="?",
        const="",
        metavar="TEXT",
        help="print the names that a config may use; the keys of one, such as --list=optim or --list=model.resnet; or every name"
        " and key with a text, such as --list=pruning",
    )
    parser.add_argument(
        "inputs", nargs="*", help="files, folders or texts, for --job=predict"
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="a Python file with get_config(), or get_config(ARGUMENT); default: that of the work directory, or digits",
    )
    parser.add_argument(
        "--config.KEY",
        metavar="VALUE",
        help="overrides a key, such as --config.optim.lr=0.1",
    )
    parser.add_argument(
        "--workdir",
        help="where everything of the run goes; default: runs/<name of the config>, or of the dataset where --config is left out",
    )
    parser.add_argument(
        "--job",
        help="what to do, see below; default: main",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0, to join several processes",
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="how many processes there are"
    )
    parser.add_argument(
        "--process", type=int, default=0, help="which of them this is, from 0"
    )
    overrides = [a for a in argv if a.startswith("--config.")]
    try:
        args, others = parser.parse_known_args([a for a in argv if a not in overrides])
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see --help") from None
    for other in others:
        if other.startswith("-"):
            flag = other.partition("=")[0]
            raise UserError(f"unknown flag {flag}{nearest(flag, parser_flags(parser))}")
    args.inputs += others
    if args.help or args.list is not None:
        text = help_text(parser, args)
        stop.check()
        print(text, flush=True)
        sys.exit(0)
    args.job = "main" if args.job is None else args.job
    return args, overrides


def help_text(parser, args):
    """Returns what --help or --list prints."""
    from squeeze_jax.jobs import _find_names, _help

    if args.list is not None:
        return _find_names.describe(args.list) if args.list else _help.list_names()
    if args.job is not None:
        return _help.describe_job(args.job)
    parser.epilog = f"{_help.list_jobs()}\n\nNames and keys for configs: --list"
    return parser.format_help()


def parser_flags(parser):
    """Returns the flags that a parser knows."""
    return [flag for action in parser._actions for flag in action.option_strings]


def file_and_argument(config):
    """Splits the value of --config into a path and the arguments of `get_config`.

    "x.py:mrpc" gives (Path("x.py"), ("mrpc",)), and "x.py" gives (Path("x.py"), ()).
    """
    from squeeze_jax import files

    whole = files.path(config, "--config")
    path, colon, argument = str(whole).rpartition(":")
    if not colon or whole.is_file():
        return whole, ()
    return pathlib.Path(path), (argument,)


def load_config(config):
    """Returns the dict that the `get_config` of a file returns; after a colon may come its argument."""
    from squeeze_jax.errors import UserError, message_of, nearest, shown
    from squeeze_jax.registry import blamed

    path, arguments = file_and_argument(config)
    if not path.is_file():
        folder = pathlib.Path(__file__).parent / "configs"
        names = [f"configs/{p.name}" for p in sorted(folder.glob("*.py"))]
        what = f"{path} is a folder, not a config file" if path.is_dir() else ""
        raise UserError(
            f"{what or f'no config file {path}'}{nearest(str(path), names)}"
        )
    name = f"config_{path.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    with blamed(path):
        spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path} has no function get_config()")
    with blamed(path):
        takes = inspect.signature(get_config).parameters
    if arguments and not takes:
        raise UserError(f"{path} takes no argument: leave out :{arguments[0]}")
    needed = [name for name, p in takes.items() if is_required(p)]
    if len(needed) > 1:
        raise UserError(
            f"{path}: get_config needs {len(needed)} arguments ({', '.join(needed)}), and the command line gives one: give the"
            " others defaults"
        )
    if needed and not arguments:
        raise UserError(
            f"{path} needs an argument: --config={path}:{needed[0].upper()}"
        )
    try:
        with blamed(path, passing=(ValueError,) if arguments else ()):
            config = get_config(*arguments)
            config = config.to_dict() if hasattr(config, "to_dict") else config
    except UserError:  # it names the file already
        raise
    except ValueError as error:  # what the file says of its argument
        raise UserError(f"{path}: {message_of(error)}") from None
    if not isinstance(config, collections.abc.Mapping):
        raise UserError(
            f"{path}: get_config() returned {shown(config)} ({type(config).__name__}), it should return a dict"
        )
    return dict(config)


def is_required(parameter):
    """Returns whether a call has to give a parameter."""
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


def override(config, argument):
    """Sets one key from `--config.a.b=value`; a number is a place in a tuple, as in `--config.phases.0.steps=40`.

    What replaces a string is a string, unless the key also takes another value that the text reads as, such as a tuple. Other
    values are Python where they read as Python. None leaves a key out that cannot be None.
    """
    from squeeze_jax.errors import UserError
    from squeeze_jax.jobs import _schemas

    key, equals, text = argument.removeprefix("--config.").partition("=")
    if not equals:
        raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
    names = key.split(".")
    if not all(names):
        raise UserError(f"--config.{key}=... has an empty name between its dots")
    declared = _schemas.find_parameter(config, names) if text == "None" else None
    placed(config, names, f"--config.{key}", text, _schemas.find_type(config, names))
    if declared is not None:
        section = config[names[0]] if names[1:] else config
        section[names[-1]] = None
        if not declared.optional:
            del section[names[-1]]
            print(f"without    config.{key}, which falls back to {declared.fallback}")


def placed(holder, names, flag, text, hint):
    """Sets the entry that names lead to; returns the section, which is a new one if it is a tuple."""
    from squeeze_jax.errors import UserError

    name, *rest = names
    if isinstance(holder, tuple | list):
        if not name.isdecimal() or int(name) >= len(holder):
            places = f"0 to {len(holder) - 1}" if holder else "none, it is empty"
            raise UserError(f"{flag}: {name} is no place in a tuple: choose {places}")
        items, at = list(holder), int(name)
    elif isinstance(holder, dict):
        items, at = holder, name
        if rest:
            items.setdefault(at, {})
    else:
        raise UserError(f"{flag}: {name} is no part of a value, only of a section")
    if rest:
        items[at] = placed(items[at], rest, flag, text, hint)
    else:
        old = items.get(at) if isinstance(items, dict) else items[at]
        replaced = isinstance(old, str)
        items[at] = replacement(text, hint) if replaced else parsed(text, flag)
    return items if isinstance(holder, dict) else type(holder)(items)


def replacement(text, hint):
    """Returns the value of a text that replaces a string, at a key with that annotation or None."""
    from squeeze_jax import registry
    from squeeze_jax.errors import UserError

    if hint in (None, typing.Any):
        return text
    try:
        value = parsed(text, "")
    except UserError:
        return text
    is_other = not isinstance(value, str | None) and registry.fits(value, hint)
    return value if is_other else text


def parsed(text, flag):
    """Returns the value that a text reads as in Python, or the text."""
    from squeeze_jax.errors import UserError, shortened

    # Names of files that are no UTF-8 are escaped in their quotes: Python's parser takes UTF-8 only.
    escaped = text.encode(errors="backslashreplace").decode()
    try:
        return ast.literal_eval(escaped)
    except (ValueError, SyntaxError):
        words = {"true": True, "false": False, "none": None}
        return words.get(text.lower(), text)
    except (TypeError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{flag}={shortened(text, 100)} is no value of Python ({error or 'too deep'})"
        ) from None


def main(argv=None):
    """Runs the job that the command line names."""
    args, overrides = parse(sys.argv[1:] if argv is None else argv)
    from squeeze_jax import files
    from squeeze_jax.jobs import _allocator

    files.expand_environment()  # before a library reads it
    _allocator.keep_memory()  # before jax is imported and starts its threads
    from squeeze_jax import registry, stop
    from squeeze_jax.errors import UserError
    from squeeze_jax.jobs import (
        _compilation,
        _experiment,
        _model_json,
        _places,
        _pretrained,
        _workdir,
    )

    job = registry.load("squeeze_jax.jobs", args.job, "job")
    check_inputs(args.inputs)
    inputs = list(map(input_of, args.inputs))
    config, workdir = config_and_workdir(args, overrides)
    _places.check(workdir)
    # Whether a job begins a run, needs one that was begun, or ignores what the work directory holds.
    use = getattr(job, "RUN", "needs")
    if use != "ignores":
        config = _model_json.with_channels(workdir, config)
    experiment = _experiment.check(config)
    join(args)
    if use == "needs":
        if args.workdir is None:
            print(f"work dir   {workdir}", file=sys.stderr)
        _workdir.check_same_experiment(workdir, config)
        examples = getattr(job, "EXAMPLES", True)
        if examples:
            _workdir.report_data(workdir, config)
        built = _experiment.build_trained(workdir, config, examples=examples)
    else:
        has_checkpoint = use == "begins" and _pretrained.has_checkpoint(workdir)
        built = _experiment.build(experiment, has_checkpoint=has_checkpoint)
    if hasattr(job, "ready"):  # whatever can be refused before a work directory is made
        job.ready(built, inputs)
    cache = _compilation.enable(**built.experiment.compilation)
    if args.processes == 1:
        stop.check()
    if use == "begins":
        _workdir.begin(workdir, config)
        if args.process == 0:
            print(f"compiled   {cache}")
    try:
        job.run(built, workdir, inputs)
    except UserError:
        if use == "begins" and args.process == 0:
            _workdir.abandon(workdir)
        raise


def config_and_workdir(args, overrides):
    """Returns the whole config that the command line asks for, and the path of the work directory."""
    from squeeze_jax import files
    from squeeze_jax.jobs import _workdir

    default = pathlib.Path(__file__).parent / "configs" / "digits.py"
    if args.workdir is not None:
        workdir = files.path(args.workdir, "--workdir")
        begun = args.config is None and _workdir.is_begun(workdir)
        config = (
            _workdir.read(workdir)
            if begun
            else load_config(default if args.config is None else args.config)
        )
        return overridden(config, overrides), workdir
    config = load_config(default if args.config is None else args.config)
    changed = overridden(config, overrides)
    if args.config is not None:
        path, arguments = file_and_argument(args.config)
        workdir = pathlib.Path("runs") / "_".join((path.stem, *arguments))
        if _workdir.is_trained(workdir):
            check_dataset(_workdir.read(workdir), changed, workdir)
        return changed, workdir
    same = dataset(changed) == dataset(config)
    workdir = pathlib.Path("runs") / ("digits" if same else dataset(changed))
    if _workdir.is_begun(workdir):
        begun = _workdir.read(workdir)
        check_dataset(begun, changed, workdir)
        changed = overridden(begun, overrides)
    return changed, workdir


def overridden(config, overrides):
    """Returns a copy of a config with the values of the command line."""
    from squeeze_jax.jobs import _settings

    changed = copy.deepcopy(dict(config))
    for each in overrides:
        override(changed, each)
    return _settings.canonical(changed)


def check_dataset(begun, config, workdir):
    """Raises a UserError if a work directory that nobody named holds a run of another dataset."""
    from squeeze_jax.errors import UserError

    for describe in place, dataset:
        theirs, ours = describe(begun), describe(config)
        if theirs != ours:
            raise UserError(
                f"{workdir} holds a network of the dataset {theirs or dataset(begun)}, not of {ours or dataset(config)}: choose"
                f" another work directory, such as --workdir={workdir}_2"
            )


TABLES = ("texts", "contiguous", "squad")  # data whose train and eval are files


def place(config):
    """Returns the paths of a config's dataset, or "" for one without a path."""
    data = config.get("data")
    data = data if isinstance(data, collections.abc.Mapping) else {}
    source = data.get("source")
    source = source if isinstance(source, collections.abc.Mapping) else {}
    paths = [source.get(key) for key in ("root", "path", "data_dir")]
    paths += [data.get("folder"), data.get("data_dir")]
    if data.get("name") in TABLES:  # elsewhere the keys name splits
        for key in "train", "eval":
            named = data.get(key)
            paths += named if isinstance(named, list | tuple) else [named]
    paths = [path for path in paths if isinstance(path, str)]
    return ", ".join(os.path.realpath(os.path.expanduser(path)) for path in paths)


def dataset(config):
    """Returns the name of a config's dataset, such as that of its folder of images."""
    data = config.get("data")
    data = data if isinstance(data, collections.abc.Mapping) else {}
    source = data.get("source")
    source = source if isinstance(source, collections.abc.Mapping) else {}
    for key in ("root", "path"):
        if isinstance(source.get(key), str):
            real = os.path.realpath(os.path.expanduser(source[key]))
            return os.path.basename(real) or "images"
    name = source.get("dataset") or source.get("name") or data.get("name") or "data"
    return pathlib.Path(str(name).replace(":", "_")).stem


def check_inputs(texts):
    """Raises a UserError if all inputs are blank. The job predict prints a line for each blank input among others."""
    from squeeze_jax.errors import UserError

    if texts and not "".join(texts).strip():
        raise UserError(f"{texts[0]!r} is no file, folder or text: leave it out")


def input_of(text):
    """Returns a file, folder or text of the command line, with the home directory in place of ~."""
    expanded = os.path.expanduser(text)
    # A text may begin with ~ too.
    is_path = os.path.lexists(expanded) or not any(c.isspace() for c in text)
    return expanded if is_path else text


def join(args):
    """Joins the other processes of the run, where there are any."""
    from squeeze_jax.errors import UserError, message_of

    if args.processes < 1:
        raise UserError(f"--processes={args.processes} should be at least 1")
    if args.coordinator == "":
        raise UserError("--coordinator= is empty: write HOST:PORT, or leave it out")
    if args.processes > 1 and not args.coordinator:
        raise UserError(
            "--processes needs --coordinator=HOST:PORT, the address of process 0"
        )
    if not 0 <= args.process < args.processes:
        raise UserError(
            f"--process={args.process} should lie in [0, {args.processes}), see --processes"
        )
    if args.coordinator:
        check_address(args.coordinator)
        import jax

        from squeeze_jax import stop

        try:
            jax.distributed.initialize(args.coordinator, args.processes, args.process)
        except RuntimeError as error:
            raise UserError(
                f"cannot join the run at --coordinator={args.coordinator}: {message_of(error)}"
            ) from None
        stop.listen_again()


def check_address(coordinator):
    """Raises a UserError unless an address is HOST:PORT."""
    from squeeze_jax.errors import UserError, shown

    host, _, port = coordinator.rpartition(":")
    known = host and port.isascii() and port.isdigit() and len(port) <= 5
    if not known or not 1 <= int(port) <= 65535:
        raise UserError(
            f"--coordinator = {shown(coordinator)} should be HOST:PORT, with a port from 1 to 65535"
        )


def one_line(message, category, filename, lineno, line=None):
    """Returns a warning as the user sees it."""
    return f"warning: {message}\n"


def end_at_once(number, frame):
    """Ends the program with one line, while it still imports its libraries."""
    os.write(2, b"\nstopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    from squeeze_jax import machine, stop
    from squeeze_jax.errors import Reported, print_any_name

    warnings.formatwarning = one_line
    print_any_name()
    try:
        with stop.listening():
            main()
            sys.stdout.flush()
            stop.check_done()
    except Reported as error:
        machine.end(error)
    except Exception as error:
        if (explained := machine.explain(error)) is None:
            raise
        machine.end(explained)
