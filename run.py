"""Runs an experiment: `python run.py --config=configs/x.py --workdir=DIR --config.steps=500`."""

import argparse
import ast
import importlib.util
import inspect
import os
import pathlib
import sys
import warnings

DESCRIPTION = """\
Runs an experiment from a config to a trained network to files that run on devices.

  python run.py                                        the main job on the digits: train, evaluate, export, measure
  python run.py --config=configs/squeezenet_cifar10.py --workdir=DIR --config.steps=500
  python run.py --job=evaluate --workdir=DIR           one part again, from the work directory
  python run.py --job=predict --workdir=DIR PHOTO.jpg FOLDER       labels of images; of a text, "A SENTENCE."
  python run.py --job=seeds --config=configs/glue_minilm.py --config.seeds='(0, 1, 2)'      the best of several

Stop it with Ctrl-C at any time; the same command continues where it was."""


def parse(argv):
    from squeeze_jax import registry

    jobs = registry.names("squeeze_jax.jobs")
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        help="where everything of the run goes; default: runs/<name of the config>",
    )
    parser.add_argument(
        "--job",
        default="main",
        help=f"one of {', '.join(jobs)}; default: main, which is all in turn",
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
    return parser.parse_args([a for a in argv if a not in overrides]), overrides


def file_and_argument(config):
    """A config file, and what its `get_config` is called with: of "x.py:mrpc" x.py and ("mrpc",), of "x.py" ()."""
    path, colon, argument = str(config).rpartition(":")
    if not colon or pathlib.Path(config).is_file():
        return pathlib.Path(config), ()
    return pathlib.Path(path), (argument,)


def load_config(config):
    """The dict that the `get_config` of a file returns; after a colon may come what it is called with."""
    from squeeze_jax.errors import UserError, nearest

    path, arguments = file_and_argument(config)
    if not path.is_file():
        found = [
            str(p) for p in sorted(pathlib.Path(__file__).parent.glob("configs/*.py"))
        ]
        found = [str(pathlib.Path("configs") / pathlib.Path(p).name) for p in found]
        raise UserError(f"no config file {path}{nearest(str(path), found)}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no function get_config()")
    if arguments and not inspect.signature(module.get_config).parameters:
        raise UserError(f"{path} takes no argument: leave out :{arguments[0]}")
    try:
        config = module.get_config(*arguments)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def override(config, argument):
    """Sets one key from `--config.a.b=value`.

    What replaces a string is a string; other values are Python where they read as Python.
    """
    from squeeze_jax.errors import UserError

    key, equals, text = argument.removeprefix("--config.").partition("=")
    if not equals:
        raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
    *sections, last = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
        if not isinstance(config, dict):
            raise UserError(f"--config.{key}: {section} is a value, not a section")
    if isinstance(config.get(last), str):
        config[last] = text
        return
    # Names of files that are no UTF-8 are escaped in their quotes: Python's parser takes UTF-8 only.
    escaped = text.encode(errors="backslashreplace").decode()
    try:
        config[last] = ast.literal_eval(escaped)
    except (ValueError, SyntaxError):
        words = {"true": True, "false": False, "none": None}
        config[last] = words.get(text.lower(), text)


def main(argv=None):
    args, overrides = parse(sys.argv[1:] if argv is None else argv)
    from squeeze_jax.jobs import _allocator

    _allocator.keep_memory()  # before jax is imported and starts its threads
    from squeeze_jax import registry
    from squeeze_jax.jobs import (
        _compilation,
        _experiment,
        _pretrained,
        _settings,
        _workdir,
    )

    job = registry.load("squeeze_jax.jobs", args.job, "job")
    path, arguments = file_and_argument(args.config or "digits")
    name = "_".join((path.stem, *arguments))
    workdir = pathlib.Path(args.workdir or pathlib.Path("runs") / name)
    if args.config is None and (workdir / "config.json").exists():
        config = _workdir.read(workdir)
    else:
        default = pathlib.Path(__file__).parent / "configs" / "digits.py"
        config = load_config(args.config or default)
    for each in overrides:
        override(config, each)
    config = _settings.tuples(config)
    experiment = _experiment.check(config)
    join(args)
    # Whether a job begins a run, needs one that was begun, or ignores what the work directory holds.
    use = getattr(job, "RUN", "needs")
    if use == "needs":
        _workdir.same(workdir, config)
        built = _experiment.opened(workdir, config)
    else:
        begun = use == "begins" and _pretrained.begun(workdir)
        built = _experiment.build(experiment, begun=begun)
    cache = _compilation.enable(**built.experiment.compilation)
    if use == "begins":
        _workdir.begin(workdir, config)
        if args.process == 0:
            print(f"compiled   {cache}")
    job.run(built, workdir, args.inputs)


def join(args):
    """Joins the other processes of the run, where there are any."""
    from squeeze_jax.errors import UserError

    if args.processes > 1 and not args.coordinator:
        raise UserError(
            "--processes needs --coordinator=HOST:PORT, the address of process 0"
        )
    if not 0 <= args.process < args.processes:
        raise UserError(
            f"--process={args.process} should lie in [0, {args.processes}), see --processes"
        )
    if args.coordinator:
        import jax

        from squeeze_jax import stop

        jax.distributed.initialize(args.coordinator, args.processes, args.process)
        stop.listen_again()


def one_line(message, category, filename, lineno, line=None):
    """A warning as the user sees it."""
    return f"warning: {message}\n"


def end(error):
    """Prints an error's line and ends with its status."""
    from squeeze_jax import files

    lead = "\n" if error.status > 128 else "error: "
    print(f"{lead}{error}", file=sys.stderr, flush=True)
    if isinstance(error, files.DiskFull):
        sys.stdout.flush()
        os._exit(error.status)  # each thread of a library would report it once more
    sys.exit(error.status)


if __name__ == "__main__":
    from squeeze_jax import files, stop
    from squeeze_jax.errors import Reported, print_any_name

    warnings.formatwarning = one_line
    print_any_name()
    try:
        with stop.listening():
            main()
    except Reported as error:
        end(error)
    except OSError as error:
        if not files.is_full(error):
            raise
        where = f" in {error.filename}" if error.filename else ""
        end(files.DiskFull(f"no space left on the disk{where}"))
