"""The job search: scores, limits, trade-offs, the log that a stopped search goes on from, and what it refuses."""

import contextlib
import functools
import io
import itertools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run as run_py
from squeeze_jax import stop
from squeeze_jax.cost import latency_table as tables
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _experiment,
    _plugs,
    _scores,
    _search_predictor,
    _space,
    _workdir,
    evaluate,
    extract,
    fit,
    main,
)
from squeeze_jax.jobs import search as search_job
from squeeze_jax.nas import costs, limits
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.family import Family
from squeeze_jax.nas.pareto import crowding, pareto, ranks

MODEL = dict(name="ofa_mobilenet_v3", variant="tiny", stem_strides=1)
CONFIG = dict(
    steps=2,
    batch=16,
    data=dict(source=dict(name="digits"), size=8, validation=0.1),
    model=MODEL,
    # 36 networks: fewer pieces to compile
    gradients=dict(name="nas.once_for_all", random=1, choices={"expand": (2,)}),
    optim=dict(lr=0.1, warmup=0),
    eval_every=0,
    search=dict(
        limits=({"cost": "latency", "table": "device", "share": 0.6},),
        samples=10,
        candidates=3,
        generations=3,
        population=20,
        calibration=32,
        examples=64,
        steps=1,
    ),
)


def image(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.fixture(scope="module")
def space():
    """(family, pieces, all 400 different networks with a leading axis) of the space of 8x8 images."""
    family = Family(MODEL | dict(num_classes=10), _plugs.plain(image(2, 8, 8, 1)))
    pieces = costs.Pieces(family, image(1, 8, 8, 1))
    grids = [
        list(itertools.product(*(range(len(c)) for c in choices)))
        for choices in family.space.choices.values()
    ]
    rows = list(itertools.product(*grids))
    fields = (np.asarray([row[i] for row in rows], np.int32) for i in range(3))
    archs = family.space.arch_type(*fields)
    return family, pieces, archs


def write_table(pieces, path):
    """Writes a table in which each piece takes as many microseconds as it has parameters."""
    timings = {
        tables.key_of(p.piece.module, p.example): tables.Timing(
            1e-3 * (1 + costs.parameters(p)), 0.0, 1
        )
        for p in pieces.distinct
    }
    about = dict(device="board", runtime="r", format="tflite", threads=1)
    tables.write(path, tables.Table(about | {"statistic": "median"}, timings), {})


@pytest.fixture(scope="module")
def trained(space, tmp_path_factory):
    """A work directory with a space that was trained for two steps, and a latency table."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    built = _experiment.build(_experiment.check(CONFIG))
    _workdir.begin(workdir, built.whole.config())
    fit.run(built, workdir)
    write_table(space[1], workdir / "latency" / "device.json")
    return workdir


def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def job(workdir, *overrides):
    section = [f"--config.search.{o}" for o in overrides]
    run_py.main(["--job=search", f"--workdir={workdir}", *section])


def log_of(workdir):
    lines = (workdir / "search" / "scored.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_score_is_that_of_the_extracted_network(trained):
    """The extracted network is built and evaluated whole, with statistics of the same examples."""
    built = _experiment.build_trained(trained, _workdir.read(trained))
    state = evaluate.trained_state(built, trained)
    how = _space.trained(built, trained)
    scorer = _scores.Scorer(built, how, state, calibration=48, examples=1000)
    assert scorer.examples == (48, 144)  # a tenth of the 1,437 training images
    # The first block's kernel is the largest's, the others are derived; the second stage has one block.
    space = how.networks.space
    arch = space.arch(dict(kernel=(5, 3, 3, 3), depth=(2, 1), expand=2))
    options, variables = how.networks.extract(
        arch, state.plain(), how.transforms(state.variables()["params"])
    )
    stats = extract.recalibrated(built, options, variables, 48)
    network = how.networks.network(arch)

    @jax.jit
    def predictions(batch):
        inputs = built.data.inputs(batch)
        params = variables["params"]
        logits, _ = network.apply({"params": params, "batch_stats": stats}, inputs)
        return logits.argmax(-1)

    hits = 0
    for batch in built.data.validate(16):
        right = np.asarray(predictions(fit.put_batch(batch, built)))
        hits += ((right == batch["label"]) & batch["mask"]).sum()
    assert scorer(arch) == pytest.approx(hits / 144, abs=1e-6)


def test_validation_images_are_left_out_of_training(trained):
    built = _experiment.build_trained(trained, _workdir.read(trained))
    data = built.data
    assert (data.num_train, data.num_validation, data.num_eval) == (1293, 144, 360)
    held = np.concatenate([b["image"][b["mask"]] for b in data.validate(16)])
    stream = data.train(16, 0)
    trained_on = np.concatenate([next(stream)["image"] for _ in range(81)])
    stream.close()
    unique = {row.tobytes() for row in trained_on}
    known = sum(row.tobytes() in unique for row in held)
    assert known <= 2  # some digits are alike to the pixel
    assert "1,293 train + 144 validation + 360 test" in data.describe


@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
def test_the_nearest_network_breaks_the_limits_least(space, share):
    """By looking at all networks."""
    family, pieces, archs = space
    macs, memory = (limits.cost(kind, pieces) for kind in ("macs", "memory"))
    least = float(macs.of(archs).min()), float(memory.of(archs).min())
    both = limits.Limits([macs, memory], [share * least[0], 1.2 * least[1]])
    found = limits.nearest(family.space, both)
    best = float(both.share(archs).min())
    found_share = float(both.share(jax.tree.map(lambda a: a[None], found))[0])
    assert found_share == pytest.approx(best)


def test_costs_of_a_space_by_hand(space):
    family, pieces, _ = space
    arch = family.space.largest()
    one = jax.tree.map(lambda a: a[None], arch)
    shapes = family.shapes(family.network(arch))["params"]
    count = sum(np.prod(a.shape) for a in jax.tree.leaves(shapes))
    of = {
        kind: limits.cost(kind, pieces).of(one)[0] for kind in ("parameters", "bytes")
    }
    assert of == {"parameters": count, "bytes": count}
    assert limits.cost("bytes", pieces, bits=4).of(one)[0] == count / 2


def test_ranks_and_crowding_by_hand():
    """Points (1, 4), (2, 2), (4, 1) do not dominate each other; (3, 3) is behind (2, 2); (5, 5) behind (3, 3)."""
    values = np.asarray([[1, 4], [3, 3], [2, 2], [5, 5], [4, 1]], float)
    assert ranks(values, np.zeros(5)).tolist() == [0, 1, 0, 2, 0]
    # A candidate that breaks a constraint is behind all that do not, and behind those that break it less.
    broken = np.asarray([0, 0, 2.0, 0, 1.0])
    assert ranks(values, broken).tolist() == [0, 0, 3, 1, 2]
    # (2, 2) lies between (1, 4) and (4, 1): (4 - 1) / 3 + (4 - 1) / 3.
    front = values[[0, 2, 4]]
    assert crowding(front).tolist() == [np.inf, 2.0, np.inf]


def test_the_front_of_two_costs_is_found(space):
    """Against the front among all networks, from 20 + 10 * 20 of 400; random search would find half of it."""
    family, pieces, archs = space
    macs, memory = (limits.cost(kind, pieces) for kind in ("macs", "memory"))

    def objectives(archs):  # much capacity with few MACs, at little memory
        size = sum(np.asarray(f, float).sum(1) for f in archs)
        return np.stack([macs.of(archs), memory.of(archs), -size], 1)

    everything = objectives(archs)
    true = {
        tuple(v) for v in everything[ranks(everything, np.zeros(len(everything))) == 0]
    }
    front = pareto(
        jax.random.key(0), family.space, objectives, population=100, generations=10
    )
    found = {tuple(v) for v in front.values}
    assert len(found & true) > 0.8 * len(found)
    assert ranks(front.values, np.zeros(len(front.values))).max() == 0
    within = pareto(
        jax.random.key(0),
        family.space,
        objectives,
        lambda archs: np.asarray(macs.of(archs)) - np.median(everything[:, 0]),
        population=50,
        generations=5,
    )
    assert within.values[:, 0].max() <= np.median(everything[:, 0])


@pytest.fixture(scope="module")
def searched(trained, tmp_path_factory):
    """A work directory after a search, and what the search printed."""
    workdir = shutil.copytree(trained, tmp_path_factory.mktemp("searched") / "run")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        job(workdir)
    return workdir, printed.getvalue()


def test_a_search_finds_a_network_within_its_limits(searched, trained, tmp_path):
    """The network is a work directory, its latency is below the limit, and it has the best score among such networks."""
    workdir, printed = searched
    assert "on 2 that were held out, too few to judge by" in printed
    assert "of the arithmetic of the training run" in printed
    report = json.loads((workdir / "search" / "front.json").read_text())
    options, latency = report["found"]["options"], report["found"]["costs"]
    table = tables.read(workdir / "latency" / "device.json")
    small = _experiment.build_trained(
        workdir / "found", _workdir.read(workdir / "found")
    )
    assert {k: list(small.options[k]) for k in options} == options
    state = evaluate.trained_state(small, workdir / "found")
    count = sum(a.size for a in jax.tree.leaves(state.params))
    pieces = len(small.model.pieces)
    assert latency[table.name] == pytest.approx(1e-3 * (count + pieces), rel=1e-5)
    rows = log_of(workdir)
    assert len(rows) == len({json.dumps(r["options"]) for r in rows})
    assert 10 <= len(rows) <= 13
    meets = within(small, 0.6)
    assert report["found"]["score"] == max(
        row["score"] for row in rows if meets(row["options"])
    )
    assert small.experiment.steps == 1
    assert (workdir / "search" / "front.png").stat().st_size > 10_000
    with pytest.raises(
        UserError, match=r"config\.search\.to = '.*found' holds a run already"
    ):
        job(workdir)
    # Another search reads the log: it scores new candidates only, and its own log has all scores.
    again = shutil.copytree(trained, tmp_path / "again")
    job(again, f"log={workdir / 'search' / 'scored.jsonl'}")
    assert log_of(again)[: len(rows)] == rows
    assert len(log_of(again)) <= len(rows) + 3


@pytest.fixture
def instant(monkeypatch):
    """A search whose scores are sums of kernels, and which extracts nothing; the architectures that it scores."""
    scored = []

    def score(self, arch):
        scored.append(arch)
        return float(np.sum(arch.kernel))

    monkeypatch.setattr(_scores.Scorer, "__call__", score)
    monkeypatch.setattr(extract, "write", lambda *_: None)
    monkeypatch.setattr(search_job, "describe_next", lambda *_: None)
    return scored


@pytest.mark.parametrize("method", ["regularised_evolution", "random_search"])
def test_methods_without_a_predictor_score_only_networks_within_the_limits(
    trained, tmp_path, instant, method
):
    workdir = copied(trained, tmp_path)
    limits = '({"cost": "latency", "table": "device", "share": 0.9},)'
    job(workdir, f"method={method}", f"limits={limits}")
    rows = log_of(workdir)
    assert 10 <= len(rows) <= 13
    large = _experiment.build_trained(workdir, _workdir.read(workdir))
    assert all(map(within(large, 0.9), (row["options"] for row in rows)))
    report = json.loads((workdir / "search" / "front.json").read_text())
    assert report["found"]["score"] == max(row["score"] for row in rows)


def test_scores_that_are_not_finite_are_left_out(
    trained, tmp_path, instant, monkeypatch, capsys
):
    """A search goes on without such networks, also after a stop; if there are too few others, it says so."""
    workdir, score = copied(trained, tmp_path), _scores.Scorer.__call__
    monkeypatch.setattr(
        _scores.Scorer,
        "__call__",
        lambda self, arch: score(self, arch) if len(instant) % 4 else fail(arch),
    )

    def fail(arch):
        instant.append(arch)
        return float("nan")

    overrides = "method=random_search", "limits=()", "samples=17"
    job(workdir, *overrides)
    scores = [row["score"] for row in log_of(workdir)]
    assert len(scores) == len(instant) == 20
    assert scores.count(None) == 5
    assert "accuracy of 5 of 20 networks is not finite" in capsys.readouterr().out
    found = json.loads((workdir / "search" / "front.json").read_text())["found"]
    assert found["score"] == max(s for s in scores if s is not None)
    job(workdir, *overrides)
    assert len(instant) == 20
    (workdir / "search" / "scored.jsonl").unlink()
    monkeypatch.setattr(_scores.Scorer, "__call__", lambda self, arch: float("inf"))
    with pytest.raises(
        UserError, match=r"of (\d+) of \1 networks is not finite: train"
    ):
        job(workdir, *overrides)


def test_scores_of_other_weights_or_examples_are_left_out(
    searched, trained, tmp_path, instant, capsys
):
    """The search also leaves out scores of earlier versions, whose lines do not name weights."""
    workdir = copied(trained, tmp_path)
    rows = log_of(searched[0])
    for row in rows[:3]:
        row["of"] = "others"
    del rows[3]["of"]
    (workdir / "search").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "search" / "scored.jsonl").write_text(text)
    job(workdir)
    printed = capsys.readouterr().out
    assert "log        4 scores in" in printed
    assert "of other weights, other examples or another score: left out" in printed
    assert len(instant) >= 4


def test_a_search_uses_what_its_command_changes(trained):
    """Such as the place of the data: the extracted network is evaluated on it, too."""
    config = _workdir.read(trained)
    config["data"] |= {"threads": 3}
    built = _experiment.build_trained(trained, config)
    experiment = _space.trained(built, trained).experiment
    assert experiment.data["threads"] == 3
    assert experiment.gradients["name"] == "nas.once_for_all"


def test_folders_in_use_are_no_targets(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in (
        "search",
        "checkpoints/9",
        "export/x/y",
        "latency",
        "found/x",
        "config.json",
        ".",
    ):
        with pytest.raises(
            UserError, match=r"to = '.*' lies in .*which the run itself writes"
        ):
            extract.check_target(workdir / name, "to", workdir)
    for name in "found", "other", "a/b", "../search":
        extract.check_target(workdir / name, "to", workdir)
    partial = tmp_path / "mine.partial"
    partial.mkdir()
    extract.check_target(tmp_path / "mine", "to", workdir)
    (partial / "config.json").write_text("{}")
    extract.check_target(tmp_path / "mine", "to", workdir)
    # Killed while it wrote a file under a temporary name.
    (partial / ".config.json.4242.tmp").write_text("{")
    extract.check_target(tmp_path / "mine", "to", workdir)
    (partial / "data.txt").write_text("precious")
    with pytest.raises(
        UserError,
        match=r"mine\.partial, where it is written first, exists already: move it away",
    ):
        extract.check_target(tmp_path / "mine", "to", workdir)


def test_one_search_at_a_time(trained, tmp_path):
    workdir = copied(trained, tmp_path)
    words = r"search is in use by process \d+"
    with _workdir.locked(workdir / "search"), pytest.raises(UserError, match=words):
        job(workdir)


class Scored:
    """A log whose scores are the MACs of random networks."""

    def __init__(self, space, macs):
        keys = jax.random.split(jax.random.key(0), 60)
        self._archs = jax.vmap(lambda k: spaces.sample(space, k))(keys)
        self._scores = np.log(np.asarray(macs.of(self._archs)))

    def arrays(self):
        return self._archs, self._scores


@pytest.mark.parametrize("name", ["graph", "two_stage"])
def test_each_predictor_ranks_networks_that_it_has_not_seen(
    space, monkeypatch, name, capsys
):
    family, pieces, _ = space
    problem = types.SimpleNamespace(space=family.space, pieces=pieces)
    method = _search_predictor.METHODS[name]
    quick = functools.partial(method.fit, steps=100, width=32, lr=1e-2)
    monkeypatch.setitem(_search_predictor.METHODS, name, method._replace(fit=quick))
    log = Scored(family.space, limits.cost("macs", pieces))
    archs, scores = log.arrays()
    predict, rank = _search_predictor.fit(
        problem, archs, scores, jax.random.key(1), name, 0.25
    )
    assert rank > 0.8
    assert f"rank correlation {rank:.2f} on 12" in capsys.readouterr().out
    whole = np.asarray(predict(archs))
    assert tables.rank_correlation(whole, scores) > 0.9
    monkeypatch.setattr(_search_predictor, "CHUNK", 25)
    np.testing.assert_allclose(predict(archs), whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 2, 3, 4, 5], 2.0),
        ([5, 5, 5, 5, 1], 1.0),  # the quarter lies at 5, above which nothing lies
        ([1, 1, 1, 2, 2], 1.0),
        ([1, 2, 2], 1.0),
        ([1, 1, 2], None),
        ([1, 1, 1], None),
    ],
)
def test_the_threshold_of_two_stages_leaves_two_above_and_one_below(scores, expected):
    scores = np.asarray(scores, float)
    if expected is None:
        with pytest.raises(UserError, match="networks with different scores: choose"):
            _search_predictor.threshold(scores, 0.25)
    else:
        assert _search_predictor.threshold(scores, 0.25) == expected


def within(small, share):
    """Returns a function that tells from options whether a network's latency is at most this share of the largest one's."""
    plain = _plugs.plain(small.data.example())

    def latency(options):
        net = plain.make(small.options | options)
        shapes = jax.eval_shape(net.init, jax.random.key(0), small.data.example())
        count = sum(np.prod(a.shape) for a in jax.tree.leaves(shapes["params"]))
        return count + len(net.pieces)

    largest = latency({"kernel": None, "depth": None, "expand": 2})
    return lambda options: (
        latency({k: tuple(v) for k, v in options.items()}) <= share * largest
    )


def test_a_stopped_search_goes_on(searched, trained, tmp_path, monkeypatch):
    """Its result is that of a search that was not stopped, and no network is scored twice."""
    whole, _ = searched
    stopped = shutil.copytree(trained, tmp_path / "stopped")
    score, calls = _scores.Scorer.__call__, []

    def counted(self, arch):
        calls.append(arch)
        if len(calls) == 5:
            raise stop.Stopped(15)
        return score(self, arch)

    monkeypatch.setattr(_scores.Scorer, "__call__", counted)
    with pytest.raises(stop.Stopped):
        job(stopped)
    assert len(log_of(stopped)) == 4
    with open(stopped / "search" / "scored.jsonl", "ab") as file:
        file.write(b'{"options": {"ker\xff')  # killed while it wrote
    job(stopped)
    expected, found = (
        json.loads((w / "search" / "front.json").read_text()) for w in (whole, stopped)
    )
    assert found["found"] == expected["found"]
    assert found["rows"] == expected["rows"]
    assert len(calls) == 1 + len(log_of(whole))
    assert log_of(stopped) == log_of(whole)


def test_a_search_that_was_stopped_among_its_candidates_chooses_the_same_ones(
    trained, tmp_path, instant
):
    """What a kill leaves is a log that ends there, and the number of scores to which the predictor was fitted."""
    whole = copied(trained, tmp_path)
    settings = ("limits=()", "candidates=4")
    job(whole, *settings)
    rows = log_of(whole)
    assert len(rows) > 11
    assert not (whole / "search" / "fitted.json").exists()
    stopped, last = shutil.copytree(trained, tmp_path / "stopped"), len(instant) + 11

    def score(self, arch):
        if len(instant) == last:
            raise stop.Stopped(15)
        instant.append(arch)
        return float(np.sum(arch.kernel))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_scores.Scorer, "__call__", score)
        with pytest.raises(stop.Stopped):
            job(stopped, *settings)
    assert log_of(stopped) == rows[:11]
    job(stopped, *settings)
    assert log_of(stopped) == rows
    expected, found = (
        json.loads((w / "search" / "front.json").read_text()) for w in (whole, stopped)
    )
    assert found["found"] == expected["found"]
    assert found["rows"] == expected["rows"]


def test_random_candidates_are_different_networks(trained, tmp_path, instant, capsys):
    """The space has 36 networks, of which 100,000 draws hold thousands of copies each."""
    workdir = copied(trained, tmp_path)
    job(workdir, "limits=()", "method=random", "candidates=30")
    assert len(log_of(workdir)) >= 30
    assert "different networks within" not in capsys.readouterr().out
    more = shutil.copytree(trained, tmp_path / "more")
    job(more, "limits=()", "method=random", "candidates=40")
    assert len(log_of(more)) == 36
    said = "candidates 36 different networks within the limits, of 40 that"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        {"options": {"depth": 2}},
        {"options": None},
        {"options": {"kernel": [3] * 4, "expand": [2] * 4, "depth": [9, 9]}},
        {"options": {"kernel": [3] * 4, "expand": [2] * 4}},
        {"score": "0.3"},
    ],
    ids=["one value", "none", "outside", "left out", "text"],
)
def test_a_damaged_line_of_the_log_is_named(searched, trained, tmp_path, damage):
    again = copied(trained, tmp_path)
    rows = log_of(searched[0])
    rows[2] |= damage
    (again / "search").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (again / "search" / "scored.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"jsonl: line 3 is no scored network: delete"):
        job(again)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["predictor=gcn"], r"'gcn' \(str\) should be one of 'mlp', 'graph', 'two_stage'"),
        (["score=eval_los"], "is no score of this task; did you mean 'eval_loss'"),
        (["samples=5"], "samples = 5 should be at least 10"),
        (["limits=({'cost':'macs','at_most':10},)"], r"no network of the space meets them; the nearest has MACs [\d,]+ \(at most 10\): raise at_most"),
        (["limits=({'cost':'mac','at_most':10},)"], r"config\.search\.limits\[0\]\.cost"),
        (["limits=({'cost':'macs'},)"], "needs one of the keys at_most and share"),
        (["limits=({'cost':'macs','at_most':9.0,'share':0.5},)"], "needs one of the keys"),
        (["limits=({'cost':'macs','at_most':-1},)"], "at_most"),
        (["limits=({'cost':'macs','table':'device','at_most':9.0},)"], "needs no table"),
        (["limits=({'cost':'latency','at_most':9.0},)"], "a latency needs a table"),
        (["limits=({'cost':'latency','table':'phone','at_most':9.0},)"], "cannot read the latency table phone"),
        (["front=({'cost':'macs','at_most':1.0},)"], "at_most"),
        (["log=none.jsonl"], r"config\.search\.log = 'none\.jsonl' is no file: name the"),
        (["log=configs"], r"config\.search\.log = 'configs' is no file"),
        (["to=/dev/null"], r"config\.search\.to = '/dev/null': it is a file; choose"),
        (["to=/proc/found"], r"config\.search\.to = '/proc/found': no folder can be made in /proc"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(trained, tmp_path, overrides, message):
    workdir = copied(trained, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        job(workdir, *overrides)
    assert "\n" not in str(error.value)
    assert not (workdir / "found").exists()


def test_a_table_of_another_image_size_is_refused(trained, tmp_path):
    workdir = copied(trained, tmp_path)
    family = Family(MODEL | dict(num_classes=10), _plugs.plain(image(2, 16, 16, 1)))
    path = workdir / "latency" / "device.json"
    write_table(costs.Pieces(family, image(1, 16, 16, 1)), path)
    with pytest.raises(UserError, match=r"device\.json has no latency of .*another space, image size or version"):  # fmt: skip
        job(workdir)


def test_the_main_job_ships_the_found_network(trained, tmp_path, capsys):
    """It trains the found network, exports and measures it; a second call finds everything done."""
    workdir = copied(trained, tmp_path)
    overrides = ["--config.export.formats=('tflite',)", "--config.benchmark.runs=2"]
    run_py.main(["--job=main", f"--workdir={workdir}", *overrides])
    printed = capsys.readouterr().out
    assert "found" in printed
    assert (workdir / "found" / "export" / "model.tflite").exists()
    assert (workdir / "found" / "report.json").exists()
    assert "tflite on board, 1 thread:" in printed
    assert "ms measured on this machine" in printed
    predicted = json.loads((workdir / "found" / "found.json").read_text())["found"]
    # Another search of the same space comes between, and finds another network.
    record = workdir / "search" / "front.json"
    record.write_text("{")
    run_py.main(["--job=main", f"--workdir={workdir}", *overrides])
    printed = capsys.readouterr().out
    assert "found      already" in printed
    latency = predicted["costs"]["tflite on board, 1 thread"]
    assert f"tflite on board, 1 thread: {latency:.4f} ms predicted" in printed
    assert main.RUN == "begins"
    # What another search, or none, has written is neither trained nor shipped.
    before = {p: p.stat().st_mtime_ns for p in (workdir / "found").rglob("*")}
    main_job = ["--job=main", f"--workdir={workdir}", *overrides]
    limits = "--config.search.limits=({'cost': 'macs', 'share': 0.9},)"
    words = (
        r"found was found with config\.search\.limits = .*0\.6.*this command has .*0\.9"
    )
    with pytest.raises(UserError, match=words):
        run_py.main([*main_job, limits])
    target = f"--config.search.to={tmp_path / 'other'}"
    to = f"--config.extract.to={tmp_path / 'other'}"
    run_py.main(["--job=extract", f"--workdir={workdir}", to])
    with pytest.raises(
        UserError, match=r"other holds a run without found\.json, so no search has"
    ):
        run_py.main([*main_job, target])
    shutil.copy(workdir / "found" / "found.json", tmp_path / "other")
    content = json.loads((tmp_path / "other" / "found.json").read_text())
    damaged = json.dumps(content | {"training": "0"})
    (tmp_path / "other" / "found.json").write_text(damaged)
    with pytest.raises(UserError, match="in a space of another training than this"):
        run_py.main([*main_job, target])
    assert before == {p: p.stat().st_mtime_ns for p in (workdir / "found").rglob("*")}
    with pytest.raises(UserError, match="network of the space, which the run"):
        job(tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        (dict(data=dict(source=dict(root="moved"), channels=3)), True),
        (dict(log_every=7, search=dict(samples=20)), True),
        (dict(steps=3), False),
        (dict(optim=dict(lr=0.2)), False),
        (dict(seed=1), False),
        (dict(data=dict(source=dict(root="there"), train="validation")), False),
    ],
)
def test_equal_digests_mean_equal_training(changes, same):
    """Paths and settings of jobs may differ; but another split of a dataset is other data."""
    config = dict(optim=dict(lr=0.1), batch=8, steps=2, model={})
    config["data"] = dict(source=dict(root="there"))
    digests = map(_workdir.training_digest, (config, config | changes))
    assert (len(set(digests)) == 1) == same


def test_a_missing_table_is_found_before_training(tmp_path):
    """The main job would train for hours, and then lack the table."""
    config = CONFIG | {"model": dict(name="mobilenet_v2", variant="tiny")}
    with pytest.raises(UserError, match="has no elastic"):
        _experiment.build(_experiment.check(config))
    built = _experiment.build(_experiment.check(CONFIG))
    with pytest.raises(UserError, match="cannot read the latency table device"):
        main.run(built, tmp_path / "run")
    planned = CONFIG | {"latency_table": dict(formats=("tflite",), threads=(1, 2))}
    search = CONFIG["search"] | dict(limits=(), front=({"cost": "latency", "table": "tflite_2"},))  # fmt: skip
    built = _experiment.build(_experiment.check(planned | {"search": search}))
    search_job.check_before_training(built, tmp_path / "run")
    for section, tables_section, words in (
        (dict(limits=({"cost": "macs", "at_most": 10.0},)), {}, "the nearest has MACs"),
        (dict(limits=(), log="none"), {}, "config.search.log = 'none' is no file"),
        (search, dict(device_folder="board"), "such as Pixel_8_tflite_2"),
    ):
        sections = {"search": CONFIG["search"] | section}
        sections["latency_table"] = planned["latency_table"] | tables_section
        built = _experiment.build(_experiment.check(CONFIG | sections))
        with pytest.raises(UserError, match=words):
            main.run(built, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
