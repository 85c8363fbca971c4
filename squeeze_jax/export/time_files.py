"""Times all TFLite files of a folder on this device; needs Python's standard library and LiteRT alone.

    python3 time_files.py FOLDER                     # in LiteRT's Python package: pip install ai-edge-litert
    python3 time_files.py FOLDER --adb               # on an Android phone, by LiteRT's benchmark binary

Copy this file and the folder to the device. The times go to FOLDER/times_N.jsonl for N threads, one line for each file and
round, below a line about the device and the runtime. An interrupted run goes on where it stopped. Between two rounds of a file lie
all other files, so that a slow minute of the device does not fall on one file alone.

With --adb, the script runs on a computer with the phone attached. LiteRT's benchmark binary has to be on the phone
already:

    adb push benchmark_model /data/local/tmp/ && adb shell chmod +x /data/local/tmp/benchmark_model
"""

import argparse
import glob
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time

VERSION = 1  # of the lines
PHONE_FOLDER = "/data/local/tmp/squeeze_jax"
RUNTIMES = (  # (module with the class Interpreter, package)
    ("ai_edge_litert.interpreter", "ai-edge-litert"),
    ("tflite_runtime.interpreter", "tflite-runtime"),
    ("tensorflow.lite", "tensorflow"),
)


def main(argv=None):
    """Times the files of the command line's folder; returns the exit status."""
    parser = argparse.ArgumentParser("time_files", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", help="folder of .tflite files")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5, help="passes over all files")
    parser.add_argument("--runs", type=int, default=20, help="least runs in a round")
    parser.add_argument("--seconds", type=float, default=0.05, help="least time")
    parser.add_argument("--device", help="name of the device; found by default")
    parser.add_argument("--pin", action="store_true", help="pin to as many cores")
    parser.add_argument("--adb", action="store_true", help="times on a phone")
    parser.add_argument("--binary", default="/data/local/tmp/benchmark_model")
    args = parser.parse_args(argv)
    paths = sorted(glob.glob(os.path.join(glob.escape(args.folder), "*.tflite")))
    if not paths:
        return fail(f"no .tflite files in {args.folder}")
    for name in ("threads", "rounds", "runs"):
        if getattr(args, name) < 1:
            return fail(f"--{name} should be at least 1")
    try:
        time_file, header = on_phone(args) if args.adb else on_this_device(args)
    except RuntimeError as error:
        return fail(str(error))
    target = os.path.join(args.folder, f"times_{args.threads}.jsonl")
    done = read_done(target, header)
    if done is None:
        return fail(f"{target} is of another device or runtime: move it away")
    total = args.rounds * len(paths)
    if not os.access(args.folder, os.W_OK):
        return fail(f"cannot write to {args.folder}")
    prepare_times(target, header)
    with open(target, "a") as lines:
        for number in range(args.rounds):
            for path in paths:
                name = os.path.basename(path)
                if (name, number) in done:
                    continue
                try:
                    times = time_file(path)
                except (RuntimeError, ValueError, OSError) as error:
                    reason = str(error).split("\n")[0]
                    return fail(
                        f"{name}: {reason}; if the file is damaged, delete it, and the job latency_table converts it anew"
                    )
                lines.write(json.dumps(dict(file=name, round=number, **times)) + "\n")
                lines.flush()
                done.add((name, number))
                sys.stdout.write(f"\r{len(done)} of {total}")
                sys.stdout.flush()
    print(f"\nwritten {target}")
    return 0


def fail(message):
    """Prints an error's line; returns the exit status of a command that was used wrongly."""
    print(f"error: {message}", file=sys.stderr)
    return 3


def read_done(path, header):
    """Returns the pairs (file, round) that a results file has; None if its header is not this one."""
    if not os.path.exists(path):
        return set()
    done = set()
    with open(path, errors="replace") as lines:
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except ValueError:  # damaged, or the line that was being written
                row = None
            if number == 0:
                if row != header:
                    return None
            elif isinstance(row, dict) and {"file", "round"} <= set(row):
                done.add((row["file"], row["round"]))
    return done


def prepare_times(path, header):
    """Begins a results file with the header, or ends the line of one that was being written, so that lines can be appended."""
    with open(path, "ab+") as file:
        if not file.tell():
            file.write(json.dumps(header).encode() + b"\n")
            return
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")


def on_this_device(args):
    """Returns (path → times, header) for LiteRT's Python package."""
    interpreter_class, runtime = find_runtime()
    if args.pin and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-args.threads :])

    def time_file(path):
        interpreter = interpreter_class(
            num_threads=args.threads, **interpreter_source(path)
        )
        interpreter.allocate_tensors()
        interpreter.invoke()
        start = time.perf_counter()
        warmups = 0
        while warmups < 3 or (time.perf_counter() - start < args.seconds / 5):
            interpreter.invoke()
            warmups += 1
        once = (time.perf_counter() - start) / warmups
        runs = max(args.runs, min(int(args.seconds / once), 10000))
        times = [0] * runs
        for index in range(runs):
            start = time.perf_counter()
            interpreter.invoke()
            times[index] = time.perf_counter() - start
        times.sort()
        return dict(
            count=runs, ms=1e3 * times[runs // 2], p90_ms=1e3 * times[runs * 9 // 10]
        )

    header = dict(
        version=VERSION,
        device=args.device or device_name(),
        runtime=runtime,
        threads=args.threads,
        statistic="median",
    )
    return time_file, header


def interpreter_source(path):
    """Returns the arguments by which an interpreter opens a file; the runtime opens no names that are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            return dict(model_content=file.read())
    return dict(model_path=path)


def find_runtime():
    """Returns (class of interpreters, name and version of the package) of the first runtime that is installed."""
    from importlib import metadata

    for module, package in RUNTIMES:
        try:
            interpreter_class = importlib.import_module(module).Interpreter
        except ImportError:
            continue
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        return interpreter_class, f"{package} {version}"
    raise RuntimeError("LiteRT is missing: pip install ai-edge-litert")


def device_name():
    """Returns the name of this device's processor."""
    try:
        with open("/proc/device-tree/model") as file:
            return file.read().strip("\0\n ")
    except OSError:
        pass
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def on_phone(args):
    """Returns (path → times, header) for LiteRT's benchmark binary on an Android phone."""
    model = adb("shell", "getprop", "ro.product.model").strip()
    adb("shell", "mkdir", "-p", PHONE_FOLDER)

    def time_file(path):
        there = f"{PHONE_FOLDER}/{os.path.basename(path)}"
        adb("push", path, there)
        printed = adb(
            "shell",
            args.binary,
            f"--graph={there}",
            f"--num_threads={args.threads}",
            f"--num_runs={args.runs}",
            f"--min_secs={args.seconds:g}",
            f"--warmup_min_secs={args.seconds / 5:g}",
        )
        adb("shell", "rm", there)
        found = re.search(r"Inference \(avg\): ([0-9.e+]+)", printed)
        counts = re.findall(r"count=(\d+)", printed)
        if not found or not counts:
            raise RuntimeError(f"{args.binary} printed no times: {printed[-200:]}")
        return dict(count=int(counts[-1]), ms=float(found.group(1)) / 1e3)

    header = dict(
        version=VERSION,
        device=args.device or model,
        runtime=f"LiteRT's {os.path.basename(args.binary)}",
        threads=args.threads,
        statistic="mean",
    )
    return time_file, header


def adb(*arguments):
    """Returns what a command of the Android debug bridge prints."""
    try:
        done = subprocess.run(
            ("adb", *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except FileNotFoundError:
        raise RuntimeError("adb is missing: install Android's platform tools") from None
    if done.returncode:
        raise RuntimeError(
            "adb {}: {}".format(" ".join(arguments), done.stdout.strip())
        )
    return done.stdout


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
