"""README and documentation: links lead somewhere, commands name files that exist, and the guides' commands run on tiny settings."""

import importlib.util
import json
import pathlib
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import run as run_py
from squeeze_jax.jobs import _settings

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NAMES = [page.name for page in PAGES]


@pytest.fixture(params=PAGES, ids=NAMES)
def page(request):
    return request.param


def anchors(path):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in kept}


def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_is_in_the_contents():
    listed = set(re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), re.M))
    pages = {page.stem for page in PAGES[1:]} - {"index"}
    assert pages <= listed


def test_commands_name_files_that_exist(page):
    text = page.read_text()
    named = re.findall(r"configs/\w+\.py", text)
    named += re.findall(r"tests/[\w/]+\.py", text)
    named += re.findall(r"notebooks/\w+\.ipynb", text)
    named += re.findall(r"docs/[\w/]+\.(?:md|svg|py|txt)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    jobs = set(re.findall(r"--job=([a-z_]+)", text))
    assert jobs <= set(_settings.job_names())


def test_the_readme_is_two_screens():
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 180


def test_results_have_a_machine_a_command_and_a_direction():
    files = sorted((DOCS / "results").glob("*.json"))
    included = "".join(page.read_text() for page in PAGES)
    for path in files:
        recorded = json.loads(path.read_text())
        assert f"_generated/{path.stem}.md" in included
        assert recorded["command"].startswith("python ")
        assert recorded["machine"]
        assert re.search(r"faster|better", recorded["better"])
        widths = {len(row) for row in recorded["rows"]}
        assert widths == {len(recorded["columns"])}


def test_the_table_of_networks_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = (DOCS / "networks.md").read_text()
    written = {tuple(r[:2]): tuple(r) for r in (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")) if r[0] not in ("network", "---")}  # fmt: skip
    code = tables.variants()
    assert set(written) == {(name, variant) for name, variant, _ in code}
    for name, variant, reads in code:
        if (name, variant) in (("squeezenet", "1.1"), ("mobilenet_v3", "small"), ("bert", "mini"), ("lstm", "small")):  # fmt: skip
            assert written[name, variant] == tables.row(name, variant, reads)


TINY = (
    "--config.steps=2",
    "--config.batch=8",
    "--config.eval_every=0",
    "--config.save_every=0",
    "--config.checkpoint.use=newest",
    "--config.export.formats=('stablehlo',)",
    "--config.export.check=8",
    "--config.export.calibration=8",
    "--config.export.int8_agreement=0",
    "--config.benchmark.runs=2",
    "--config.benchmark.warmup=1",
    "--config.optim.warmup=0",
)
SMALL = ('--config.model={"name": "squeezenet", "variant": "tiny", "stem_strides": 1}',)


def commands(name):
    """The commands of run.py in the pages' blocks that are marked as bash, without `python run.py`."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("python run.py")]
    assert found
    return [words[2:] for words in found]


def run(arguments, *extra, whole=True):
    """Runs a command with what makes it tiny, where the work directory does not decide that already.

    The main job is run as a whole, or else for its training alone.
    """
    if any(a.startswith(("--list", "--help")) for a in arguments):
        with pytest.raises(SystemExit):
            run_py.main(arguments)
        return
    job = next((a for a in arguments if a.startswith("--job=")), "--job=main")
    fresh = job in ("--job=main", "--job=fit")
    steps = "--config.steps="  # a command's own number of steps is made small too
    arguments = [TINY[0] if a.startswith(steps) else a for a in arguments]
    own = {a.partition("=")[0] for a in arguments}
    tiny = TINY if fresh else [a for a in TINY if ".export." in a or ".benchmark." in a]
    tiny = [a for a in tiny if a.partition("=")[0] not in own]
    if job == "--job=main" and not whole:
        tiny.append("--job=fit")
    run_py.main([*arguments, *tiny, *(extra if fresh else ())])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the configs, as if it were the repository's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def test_the_guide_of_own_images(place, capsys):
    rng = np.random.default_rng(0)
    for split in "train", "test":
        for name in "rose", "tulip":
            folder = place / "flowers" / split / name
            folder.mkdir(parents=True)
            for n in range(12):
                pixels = rng.integers(0, 256, (10, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.jpg")
        shutil.copytree(place / "flowers/train", place / "plants", dirs_exist_ok=True)
    for number, arguments in enumerate(commands("own_images.md")):
        run(arguments, *SMALL, whole=number == 0)
    printed = capsys.readouterr().out
    assert printed.count("flowers/test/") >= 13  # answers to one file and to a folder
    assert (place / "runs/flowers/report.png").exists()
    assert (place / "runs/plants/metrics.jsonl").exists()


def test_the_guides_of_the_first_run_and_of_export(place, capsys):
    Image.new("L", (8, 8)).save("PHOTO.png")
    for arguments in commands("start.md"):
        if "squeezenet_cifar10" in "".join(arguments):  # wants the dataset
            continue
        wide = any("wide" in a for a in arguments)
        run(arguments, *(() if wide else SMALL), whole=not wide)
    for arguments in commands("export.md"):
        run(arguments)
    assert (place / "runs/digits/export/model_int8.tflite").exists()
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "export.md").read_text(), re.DOTALL)  # fmt: skip
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip() in map(str, range(10))


def test_the_guides_of_supernets_and_of_devices(place, capsys):
    first = "{'steps': 1}"
    second = "{'steps': 1, 'begin': {'name': 'nas.sort_channels'}, 'gradients': {'name': 'nas.once_for_all', 'random': 1, 'choices': {'expand': (2,)}}, 'optim': {'lr': 0.02}}"
    training = [f"--config.phases=({first}, {second})", "--config.batch=8", "--config.optim.warmup=0"]  # fmt: skip
    search = [f"--config.search.{key}" for key in ("samples=10", "calibration=8", "examples=8", "steps=1", "generations=1")]  # fmt: skip
    timing = [f"--config.latency_table.{key}" for key in ("networks=4", "rounds=5", "runs=3", "seconds=0")]  # fmt: skip
    files = [a for a in TINY if ".export." in a or ".benchmark." in a]
    tiny = {"main": [*training, *search, *timing, *files], "search": search}
    tiny |= {"latency_table": timing, "export": files, "extract": []}
    for name in "supernets.md", "measure_device.md":
        for arguments in commands(name):
            jobs = [a.removeprefix("--job=") for a in arguments if "--job=" in a]
            fresh = training if jobs and "--config=" in "".join(arguments) else []
            run_py.main([*arguments, *tiny[jobs[0] if jobs else "main"], *fresh])
    printed = capsys.readouterr().out
    assert (place / "runs/ofa_digits/found/report.json").exists()
    assert (place / "runs/half/config.json").exists()
    assert "copy the folder to the device" in printed
    assert "extracted  kernel 3 3 3 3, expand 2 2 2 2, depth 1 1" in printed
    assert (place / "runs/small/export/model.stablehlo").exists()
    small = json.loads((place / "runs/small/config.json").read_text())
    assert small["steps"] == 1
    assert small["optim"]["lr"] == 0.02  # of the last phase


WORDS = ("a", "charming", "and", "often", "affecting", "journey", "slow", "dull")
SIZES = dict(layers=1, features=16, heads=2, ffn_features=16, positions=128)


@pytest.fixture
def encoder(place):
    """What makes the configs of text tiny: a vocabulary and a small network."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    (place / "vocab.txt").write_text("\n".join((*special, *WORDS)) + "\n")
    model = dict(name="squeezebert", variant="toy", vocabulary=13) | SIZES
    return (
        "--config.data.tokenizer=vocab.txt",
        "--config.init={}",
        f"--config.model={json.dumps(model)}",
    )


def rows(count, **columns):
    """Rows with a text each."""
    rng = np.random.default_rng(0)
    for n in range(count):
        text = " ".join(rng.choice(WORDS, 6))
        yield {"text": text} | {name: value(n) for name, value in columns.items()}


def lines(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def csv_lines(path, made):
    made = list(made)
    text = [",".join(made[0])] + [",".join(map(str, row.values())) for row in made]
    path.write_text("\n".join(text) + "\n")


def test_the_guide_of_own_texts(place, encoder, capsys):
    csv_lines(place / "reviews.csv", rows(60, label=lambda n: ("good", "bad")[n % 2]))
    stars = [
        {"review": r["text"], "stars": r["n"]} for r in rows(60, n=lambda n: n % 5)
    ]
    csv_lines(place / "stars.csv", stars)
    pairs = ({"question": r["text"], "answer": "a", "label": r["n"]} for r in rows(60, n=lambda n: n % 3))  # fmt: skip
    lines(place / "pairs.jsonl", pairs)
    lines(place / "lengths.jsonl", rows(60, label=lambda n: n / 7))
    tags = rows(60, label=lambda n: '"' + ",".join(("dull", "slow")[: n % 3]) + '"')
    csv_lines(place / "tags.csv", tags)
    for number, arguments in enumerate(commands("own_texts.md")):
        run(arguments, *encoder, whole=number == 0)
    printed = capsys.readouterr().out
    assert "a charming and often affecting journey" in printed
    for name, score in dict(texts="eval_accuracy", lengths="eval_rmse", tags="eval_f1").items():  # fmt: skip
        report = (place / f"runs/{name}/metrics.jsonl").read_text()
        assert score in report


def test_the_guide_of_distillation(place, encoder):
    folder = place / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for split in "train", "dev":
        text = "".join(f"{r['text']}\t{r['n'] % 2}\n" for r in rows(24, n=int))
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + text)
    teachers = "--config.distill.teachers=({'workdir': 'runs/glue_minilm'},)"
    losses = '({"name": "losses.cross_entropy"}, {"name": "distill.soft_logits"})'
    for arguments in commands("distil.md"):
        if any("glue_squeezebert" in a for a in arguments):
            run(arguments, *encoder, teachers, f"--config.objective={losses}")
        else:
            run(arguments, *encoder, whole=False)
    assert (place / "runs/glue_squeezebert/report.json").exists()


def test_the_code_of_the_concepts_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "concepts.md").read_text(), re.DOTALL)  # fmt: skip
    names = {}
    exec(code, names)
    pixels = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(names["net"].init, jax.random.key(0), pixels)["params"]
    assert shapes["bottleneck3"]["expand"]["kernel"].shape == (1, 1, 24, 60)
    assert "bottleneck5" not in shapes


@pytest.mark.usefixtures("four_devices")
def test_the_guide_of_devices(place, capsys):
    for arguments in commands("devices.md"):
        run(arguments, *SMALL)
    assert "mesh       4 x cpu: data 4" in capsys.readouterr().out
