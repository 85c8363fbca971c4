"""Measures the latencies of all pieces of a space of networks on a device: `latency/*.json` in the work directory.

Each different piece is built with random weights, compiled and timed once, so the config's network need not be trained. The latency
of any network of the space is predicted from the table. Some whole networks are timed too: one half of them corrects
the predictions, and the other half shows their error.

The runtimes of this machine are XLA and LiteRT. Any other device gets a folder of files and a script of Python's standard
library, see `config.latency_table.device_folder`.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np

from squeeze_jax import files, stop
from squeeze_jax.cost import latency_table, timing
from squeeze_jax.cost.latency_table import Table, Whole
from squeeze_jax.errors import UserError
from squeeze_jax.export import process, time_files
from squeeze_jax.export.runnable import load_format
from squeeze_jax.jobs import _piece_files, _settings, _space, _workdir
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.nas import costs
from squeeze_jax.nas import space as spaces
from squeeze_jax.ranges import Count, Distinct, Filled, PathStr, Runs, Seconds
from squeeze_jax.ranges import Whole as WholeNumber
from squeeze_jax.report import provenance
from squeeze_jax.report.table import align

RUN = "ignores"  # the job needs a config only
SECONDS = 24 * 3600.0
LONGEST = 80  # letters of a device's name in the name of its table


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.latency_table`.

    Attributes:
      formats: what is timed, each once: "xla" on JAX's default device, and "tflite" and "tflite_int8" in LiteRT.
      threads: numbers of CPU threads for LiteRT, each once; the job writes one table per number.
      networks: number of whole networks that are timed, from the smallest to the largest; 0 for none, at least 4 otherwise.
      rounds: passes over all pieces; 1 to 1,000,000.
      runs: least number of timed runs of a piece in a round; 1 to 1,000,000.
      seconds: least time of these runs together, in seconds; at most 3,600.
      device_folder: a folder for another device. The first call writes the files and the script there. Once the
        script has run, a second call with the same folder reads the times.
    """

    formats: Annotated[
        tuple[Literal["xla", "tflite", "tflite_int8"], ...], Distinct(), Filled()
    ] = ("tflite",)
    threads: Annotated[tuple[Count, ...], Distinct(), Filled()] = (1,)
    networks: WholeNumber = 12
    rounds: Runs = 5
    runs: Runs = 20
    seconds: Seconds = 0.05
    device_folder: PathStr | None = None


def names(settings: Settings) -> list[str]:
    """Returns the names of the tables of this machine, such as "tflite_1"."""
    return [
        name
        for key in settings.formats
        for name in (
            ["xla"] if key == "xla" else [f"{key}_{n}" for n in settings.threads]
        )
    ]


def check(settings: Settings, built: Built) -> None:
    """Raises a UserError for too few networks, and for XLA on another device."""
    del built
    if 0 < settings.networks < 4:
        raise UserError(
            f"config.latency_table.networks = {settings.networks} should be 0, or at least 4: two to correct predictions and"
            " two to check them"
        )
    if settings.device_folder is not None and "xla" in settings.formats:
        raise UserError(
            "config.latency_table.device_folder: XLA is timed on this machine only: leave 'xla' out of formats"
        )


def ready(built: Built, inputs: Sequence[str] = ()) -> None:
    """Raises a UserError if the network has no elastic options, or the packages of a format are missing."""
    if inputs:
        raise UserError(f"the job latency_table takes no files: {inputs[0]}")
    settings = _settings.job_settings(built, Settings)
    for key in settings.formats:
        if key != "xla":
            load_format(key)
    _space.family(built)


def run(
    built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()
) -> list[pathlib.Path]:
    """Measures the tables, prints their errors, and returns their paths.

    The job keeps a finished table of this space, runtime and device. An interrupted measurement goes on where it stopped.

    Raises:
      UserError: see `ready`; or a table in the work directory is of another device or runtime.
      process.Crash: a conversion failed, or a runtime crashed.
    """
    ready(built, inputs)
    with _workdir.locked(workdir / "latency"):
        return _measure(built, workdir)


def _measure(built: Built, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Measures the tables and returns their paths; see `run`."""
    settings = _settings.job_settings(built, Settings)
    networks = _space.family(built)
    pieces = _space.pieces(built, networks)
    key = jax.random.key(built.experiment.seed)
    archs = spaces.spread_networks(networks.space, settings.networks, key)
    wanted = _piece_files.targets(pieces, archs)
    print(
        f"space      {networks.space.describe()}: {len(wanted) - len(archs)} different pieces, {len(archs)} whole networks",
        flush=True,
    )
    folder = settings.device_folder and files.path(settings.device_folder)
    paths = []
    for key in settings.formats:
        if key == "xla":
            paths.append(_table_of_xla(built, networks, pieces, wanted, workdir))
        elif folder:
            paths += _tables_of_device(
                folder / key, key, built, networks, pieces, wanted, workdir
            )
        else:
            paths += _tables_of_litert(key, built, networks, pieces, wanted, workdir)
    return paths


def _tables_of_litert(
    key, built, networks, pieces, wanted, workdir
) -> list[pathlib.Path]:
    """Times files in LiteRT on this machine, and returns the paths of the tables."""
    settings = _settings.job_settings(built, Settings)
    folder = workdir / "latency" / key
    paths = []
    for threads in settings.threads:
        path = workdir / "latency" / f"{key}_{threads}.json"
        paths.append(path)
        _, runtime = time_files.find_runtime()
        about = dict(device=time_files.device_name(), runtime=runtime, threads=threads)
        if _is_complete(path, wanted, about):
            print(f"measured   already: {path}", flush=True)
            continue
        with _Progress(f"converting to {key}", len(wanted)) as progress:
            _piece_files.write(folder, key, wanted, networks, built, progress)
        times = folder / f"times_{threads}.jsonl"
        with _Progress(f"timing {key}", settings.rounds * len(wanted)) as progress:
            process.run_module(
                "squeeze_jax.export.time_files",
                *(
                    folder,
                    "--pin",
                    f"--threads={threads}",
                    f"--rounds={settings.rounds}",
                ),
                *(f"--runs={settings.runs}", f"--seconds={settings.seconds}"),
                what=f"the timing of {key}",
                timeout=SECONDS,
                poll=lambda path=times, show=progress: show(_lines(path) - 1),
            )
        header, timings = _piece_files.read_times(times, {t.name for t in wanted})
        _write_table(path, key, header, timings, networks, pieces, wanted)
    shutil.rmtree(folder, ignore_errors=True)
    return paths


def _tables_of_device(
    folder, key, built, networks, pieces, wanted, workdir
) -> list[pathlib.Path]:
    """Writes the files for another device, or reads its times."""
    with _Progress(f"converting to {key}", len(wanted)) as progress:
        _piece_files.write(folder, key, wanted, networks, built, progress)
    rounds = _settings.job_settings(built, Settings).rounds
    paths = []
    for times in sorted(folder.glob("times_*.jsonl")):
        header, timings = _piece_files.read_times(
            times, {t.name for t in wanted}, rounds
        )
        path = workdir / "latency" / f"{table_name(header, key)}.json"
        if path.exists():
            _check_same(path, {k: header[k] for k in ("device", "runtime", "threads")})
        _write_table(path, key, header, timings, networks, pieces, wanted)
        paths.append(path)
    if not paths:
        settings = _settings.job_settings(built, Settings)
        options = f"--rounds={settings.rounds} --runs={settings.runs} --seconds={settings.seconds:g}"
        print(
            f"written    {len(wanted)} files to {folder}: copy the folder to the device and run there\n"
            f"             python3 time_files.py . --threads={settings.threads[0]} {options}\n"
            f"           or, with an Android phone attached to this machine,\n"
            f"             python3 {folder}/time_files.py {folder} --adb --threads={settings.threads[0]} {options}\n"
            f"           Then copy times_*.jsonl back to {folder} and give the same command again"
        )
    return paths


def table_name(header: Mapping[str, Any], key: str) -> str:
    """Returns the name of the table of another device, such as "Pixel_8_tflite_1", which every file system accepts.

    Args:
      header: has "device" and "threads".
      key: the format.
    """
    letters = (c if c.isalnum() and c.isascii() else "_" for c in header["device"])
    return f"{''.join(letters)[:LONGEST]}_{key}_{header['threads']}"


def _table_of_xla(built, networks, pieces, wanted, workdir) -> pathlib.Path:
    """Times pieces and networks on JAX's default device, and returns the path of the table."""
    path = workdir / "latency" / "xla.json"
    device = jax.devices()[0]
    name = time_files.device_name() if device.platform == "cpu" else device.device_kind
    about = dict(device=name, runtime=f"jax {jax.__version__}", threads=0)
    if _is_complete(path, wanted, about):
        print(f"measured   already: {path}", flush=True)
        return path
    times = workdir / "latency" / "times_xla.jsonl"
    header = about | {"version": time_files.VERSION, "statistic": "median"}
    _time_in_xla(times, header, built, networks, wanted)
    header, timings = _piece_files.read_times(times, {t.name for t in wanted})
    _write_table(path, "xla", header, timings, networks, pieces, wanted)
    times.unlink()
    return path


def _time_in_xla(times, header, built, networks, wanted) -> None:
    """Writes a line for each target and round; goes on with the lines of an earlier run in the same runtime."""
    settings = _settings.job_settings(built, Settings)
    times.parent.mkdir(parents=True, exist_ok=True)
    done = time_files.read_done(times, header)
    if done is None:
        times.unlink()
        done = set()
    left = [
        (number, target)
        for number in range(settings.rounds)
        for target in wanted
        if (target.name, number) not in done
    ]
    once, names = {}, {target.name for _, target in left}
    with _Progress("compiling for xla", len(names)) as progress:
        for target in wanted:
            stop.check()
            if target.name in names:
                once[target.name] = _compiled(
                    *_piece_files.function_of(target, networks, built)
                )
                progress(len(once))
    time_files.prepare_times(times, header)
    with (
        open(times, "a") as lines,
        _Progress("timing xla", settings.rounds * len(wanted)) as progress,
    ):
        for place, (number, target) in enumerate(left, 1):
            stop.check()
            thunk = once[target.name]
            first = min(timing.times(thunk, 3)) / 1e3
            runs = max(settings.runs, min(int(settings.seconds / first), 10_000))
            median = float(np.median(timing.times(thunk, runs)))
            row = dict(file=target.name, round=number, count=runs, ms=median)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            progress(len(done) + place)


def _compiled(fn, specs):
    """Returns a function without arguments that runs `fn` once on random inputs until its outputs are ready."""
    examples = jax.device_put(_piece_files.random_examples(specs, 1))
    program = jax.jit(fn).lower(examples).compile()
    return lambda: jax.block_until_ready(program(examples))


def _write_table(path, key, header, timings, networks, pieces, wanted) -> None:
    """Fits the correction, writes the table, and prints its errors."""
    about = {k: header[k] for k in latency_table.ABOUT if k in header} | {"format": key}
    table = Table(about, {t.key: timings[t.name] for t in wanted if t.key})
    sums = pieces.tabulate(costs.measured(table, str(path)))
    counts = pieces.tabulate(lambda placed: 1)
    whole = []
    for number, target in enumerate(t for t in wanted if not t.key):
        options = networks.space.options(target.arch)
        total, count = float(sums(target.arch)), int(counts(target.arch))
        held_out = number % 2 == 1
        whole.append(Whole(options, timings[target.name], total, count, held_out))
    scale, join_ms = latency_table.fit([n for n in whole if not n.held_out])
    table = table._replace(networks=whole, scale=scale, join_ms=join_ms)
    latency_table.write(path, table, provenance.collect())
    print(f"table      {table.name}: {len(table.pieces)} pieces")
    if whole:
        print(_describe_errors(table))
    busy = sum(t.spread > 0.2 for t in table.pieces.values())
    if busy > len(table.pieces) / 4:
        print(
            f"warning    {busy} of {len(table.pieces)} pieces took more than 20% longer in one round than in another: other work"
            " slowed the device down"
        )
    print(f"written    {path}", flush=True)


def _describe_errors(table: Table) -> str:
    """Returns the correction, and each network's measured and predicted latency."""
    rows = [["network", "measured, ms", "predicted, ms", "error"]]
    for n in table.networks:
        predicted, kind = table.predict(n.sum_ms, n.pieces), ("fitted", "held out")
        cells = f"{n.timing.ms:.4f}", f"{predicted:.4f}"
        rows.append([kind[n.held_out], *cells, f"{predicted / n.timing.ms - 1:+.1%}"])
    error = table.error()
    return (
        f"prediction {table.scale:.3f} · sum over pieces {table.join_ms:+.5f} ms · (pieces - 1)\n"
        f"{align(rows)}\n"
        f"error      mean {error['mean']:.1%}, largest {error['largest']:.1%}, rank correlation {error['rank']:.3f} on the"
        " held-out networks"
    )


def _is_complete(path, wanted, about) -> bool:
    """Returns whether a table has all pieces; raises a UserError for one of another runtime or device."""
    if not path.exists():
        return False
    table = _check_same(path, about)
    keys = {t.key for t in wanted if t.key}
    networks = sum(not t.key for t in wanted)
    return keys <= set(table.pieces) and len(table.networks) >= networks


def _check_same(path: pathlib.Path, about: Mapping[str, Any]) -> Table:
    """Returns the table in a file; raises a UserError if it is of another device or runtime."""
    table = latency_table.read(path)
    for field, value in about.items():
        if table.about.get(field) != value:
            raise UserError(
                f"{path} is of the {field} {table.about.get(field)!r}, and this is {value!r}: move the table away, or choose"
                " another --workdir"
            )
    return table


def _lines(path: pathlib.Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


class _Progress:
    """Prints how many of a number of things are done: on a terminal in one line, elsewhere every ten seconds."""

    def __init__(self, what: str, total: int):
        self._what, self._total = what, total
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stdout.isatty()

    def __enter__(self):
        return self

    def __call__(self, done: int) -> None:
        """Shows the number that is done."""
        now = time.monotonic()
        if now - self._shown > (0.5 if self._terminal else 10):
            self._shown = now
            end, start = ("", "\r") if self._terminal else ("\n", "")
            print(
                f"{start}{self._what:10} {max(done, 0)} of {self._total}",
                end=end,
                flush=True,
            )

    def __exit__(self, kind, *_):
        if kind is None:
            seconds = time.monotonic() - self._start
            start = "\r" if self._terminal else ""
            print(
                f"{start}{self._what:10} {self._total} files in {seconds:.1f} s",
                flush=True,
            )
