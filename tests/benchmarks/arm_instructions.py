"""Instructions that ARM executes for a layer of an encoder in LiteRT, `python tests/benchmarks/arm_instructions.py`.

What a phone's processor would execute for one example on one thread: LiteRT built for 64-bit ARM, with its NEON kernels,
runs under qemu as a Cortex-A76, and a plugin counts. A layer is the difference between networks of two and of one, an
example that between two runs and one. It is no latency: memory and what a core does at once are left out; it repeats to a
few percent.

For x86-64 Linux with Debian's packages: everything but gcc is downloaded to --tools and unpacked there, nothing is
installed. LiteRT is 2.1.6, because later ones fail under qemu when a file is opened.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import litert_encoders
import workload

WHEELS = ("ai-edge-litert==2.1.6", "numpy==2.2.6")
PYTHON = "3.11"  # Debian 12's
GUEST = (  # of the 64-bit ARM
    f"python{PYTHON}-minimal libpython{PYTHON}-minimal libpython{PYTHON}-stdlib libc6 libstdc++6 libgcc-s1 zlib1g"
    " libexpat1 libffi8 liblzma5 libbz2-1.0 libssl3 libuuid1 libcrypt1"
).split()
HOST = ("qemu-user", "libcapstone4", "liburing2")

# The few declarations of qemu-plugin.h (interface 1) that are needed, and a counter.
PLUGIN = """
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#define SHOWN __attribute__((visibility("default")))
typedef uint64_t id_t_;
struct qemu_plugin_tb;
extern void qemu_plugin_register_vcpu_tb_trans_cb(id_t_, void (*)(id_t_, struct qemu_plugin_tb *));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int add, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(id_t_, void (*)(id_t_, void *), void *);
SHOWN int qemu_plugin_version = 1;
static uint64_t executed;
static void translated(id_t_ id, struct qemu_plugin_tb *block) {
    qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &executed, qemu_plugin_tb_n_insns(block));
}
static void finished(id_t_ id, void *unused) {
    fprintf(stderr, "instructions %llu\\n", (unsigned long long)executed);
}
SHOWN int qemu_plugin_install(id_t_ id, const void *info, int argc, char **argv) {
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
"""

PROGRAM = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
network = Interpreter(sys.argv[1], num_threads=1)
network.allocate_tensors()
for each in network.get_input_details():
    fill = np.ones if "attended" in each["name"] else np.zeros
    network.set_tensor(each["index"], fill(each["shape"], each["dtype"]))
for _ in range(int(sys.argv[2])):
    network.invoke()
"""


def tools(folder: Path) -> None:
    """Downloads and unpacks what is missing, and compiles the plugin."""
    if (folder / "count.so").exists():
        return
    debs, lists = folder / "debs", folder / "lists"
    for each in (debs, lists / "partial", folder / "guest/site", folder / "host"):
        each.mkdir(parents=True, exist_ok=True)
    foreign = [
        "-oAPT::Architecture=arm64",
        "-oAPT::Architectures=arm64",
        f"-oDir::State::Lists={lists}",
    ]
    quiet = {"check": True, "cwd": debs, "stdout": subprocess.DEVNULL}
    subprocess.run(["apt-get", *foreign, "update"], **quiet)
    subprocess.run(["apt-get", *foreign, "download", *GUEST], **quiet)
    subprocess.run(["apt-get", "download", *HOST], **quiet)
    for deb in debs.glob("*.deb"):
        where = folder / ("guest" if "_arm64" in deb.name else "host")
        subprocess.run(["dpkg", "-x", deb, where], **quiet)
    kinds = [f"--platform=manylinux_2_{n}_aarch64" for n in (17, 27, 28)]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", debs]
    pip += ["--only-binary=:all:", f"--python-version={PYTHON}", *kinds]
    subprocess.run([*pip, *WHEELS], **quiet)
    for wheel in debs.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "guest/site")
    (folder / "count.c").write_text(PLUGIN)
    (folder / "program.py").write_text(PROGRAM)
    compiler = ["gcc", "-shared", "-fPIC", "-O2", folder / "count.c"]
    subprocess.run([*compiler, "-o", folder / "count.so"], **quiet)
    # What Python compiles at the first import would count.
    executed(folder, "-c", "import ai_edge_litert.interpreter")


def executed(folder: Path, *arguments: object) -> int:
    """Instructions of a process of Python with these arguments."""
    libraries = folder / "host/usr/lib/x86_64-linux-gnu"
    guest = {
        "PYTHONHOME": "/usr",
        "PYTHONPATH": folder / "guest/site",
        "LD_LIBRARY_PATH": "/usr/lib/aarch64-linux-gnu",
        "PYTHONHASHSEED": "0",
    }
    command = [folder / "host/usr/bin/qemu-aarch64", "-L", folder / "guest"]
    command += ["-cpu", "cortex-a76", "-plugin", folder / "count.so"]
    for name, value in guest.items():
        command += ["-E", f"{name}={value}"]
    command += [folder / f"guest/usr/bin/python{PYTHON}", *arguments]
    done = subprocess.run(
        list(map(str, command)),
        env={"LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
    )
    found = re.search(r"^instructions (\d+)$", done.stderr, re.M)
    if done.returncode or not found:
        raise RuntimeError(f"{arguments} under qemu: {done.stderr[-500:]}")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    variants = tuple(litert_encoders.VARIANTS)
    parser.add_argument(
        "--variants", nargs="+", default=["bert", "squeezebert"], choices=variants
    )
    formats = ("tflite", "tflite_dynamic", "tflite_int8")
    parser.add_argument("--formats", nargs="+", default=formats, choices=formats)
    parser.add_argument("--sequence", type=int, default=128, help="tokens")
    parser.add_argument("--runs", type=int, default=2, help="more than one")
    parser.add_argument("--folder", type=Path, help="keeps the exported files")
    parser.add_argument("--tools", type=Path, help="keeps what is downloaded")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch, "files")).resolve()
        place = (args.tools or Path(scratch, "tools")).resolve()
        tools(place)
        print(f"millions of instructions of a layer, sequence {args.sequence}")
        for variant in args.variants:
            for key in args.formats:
                one, two = (
                    _example(variant, key, n, folder, place, args) for n in (1, 2)
                )
                print(f"{variant:12} {key:14} {(two - one) / 1e6:8.1f}", flush=True)
    print(workload.say(workload.origin("not asked")))


def _example(variant, key, layers, folder, place, args) -> float:
    """Instructions for one example of a network of so many layers."""
    args.layers = layers
    file = litert_encoders.exported(variant, key, folder, args)
    program = place / "program.py"
    many, once = (executed(place, program, file, n) for n in (args.runs, 1))
    return (many - once) / (args.runs - 1)


if __name__ == "__main__":
    main()
