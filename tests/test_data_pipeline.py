"""The order of examples, resuming, splitting over processes, padding, corrupt images, and errors of `data.make`."""

import collections
import itertools
import logging
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from squeeze_jax import data
from squeeze_jax.data import vision
from squeeze_jax.data.pipeline import draws
from squeeze_jax.errors import UserError

EVERYTHING = dict(size=16, crop="random_resized", flip=True, randaugment=2)
PADDED = dict(size=16, crop="pad", pad=3, flip=True, randaugment=1)


def folder(root, **keys):
    return data.make(source={"name": "folder", "root": str(root)}, **keys)


def take(batches, n):
    found = list(itertools.islice(batches, n))
    batches.close()
    return found


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_batches_have_the_promised_shapes(photos):
    (batch,) = take(folder(photos, **EVERYTHING).train(6, seed=0), 1)
    found = {k: (v.shape, v.dtype) for k, v in batch.items()}
    assert found == {
        "image": ((6, 16, 16, 3), np.uint8),
        "label": ((6,), np.int32),
        "mask": ((6,), bool),
        "index": ((6,), np.int64),
    }
    assert batch["mask"].all()


def test_every_epoch_holds_each_example_once_in_another_order(photos):
    batches = take(folder(photos, size=8).train(6, seed=3), 10)  # 60 = 3 epochs of 20
    order = np.concatenate([b["index"] for b in batches]).reshape(3, 20)
    for epoch in order:
        assert sorted(epoch) == list(range(20))
    assert len({tuple(epoch) for epoch in order}) == 3


def test_labels_belong_to_their_examples(photos):
    # Files are in the order of classes: 9, 6, 5 of training, 3, 2, 2 of test.
    opened = folder(photos, size=8)
    assert opened.label_names == ("ant", "bee", "cow")
    assert (opened.num_classes, opened.num_train, opened.num_eval) == (3, 20, 7)
    (batch,) = take(opened.train(20, seed=1), 1)
    truth = np.repeat([0, 1, 2], [9, 6, 5])
    np.testing.assert_array_equal(batch["label"], truth[batch["index"]])
    (batch,) = list(opened.eval(7))
    np.testing.assert_array_equal(batch["label"], np.repeat([0, 1, 2], [3, 2, 2]))


def test_each_of_several_processes_may_have_one_row(photos):
    opened = folder(photos, size=8)
    whole = take(opened.train(2, seed=4), 3)
    parts = [take(opened.train(2, 4, 0, (i, 2)), 3) for i in range(2)]
    joined = [
        np.concatenate([a["index"], b["index"]]) for a, b in zip(*parts, strict=True)
    ]
    for batch, index in zip(whole, joined, strict=True):
        np.testing.assert_array_equal(batch["index"], index)


@pytest.mark.parametrize("keys", [EVERYTHING, PADDED], ids=["resized", "padded"])
def test_a_seed_decides_everything(photos, keys):
    runs = [take(folder(photos, **keys).train(4, seed=s), 6) for s in (5, 5, 6)]
    assert_equal(runs[0], runs[1])
    assert any((a["index"] != b["index"]).any() for a, b in zip(*runs[1:], strict=True))
    # The same example looks different the next time.
    looks = collections.defaultdict(set)
    for batch in runs[0]:
        for i, image in zip(batch["index"], batch["image"], strict=True):
            looks[i].add(image.tobytes())
    again = [seen for seen in looks.values() if len(seen) > 1]
    assert again  # 24 of a stream of 20: some come twice


@pytest.mark.parametrize("keys", [EVERYTHING, PADDED], ids=["resized", "padded"])
@pytest.mark.parametrize("done", [1, 4, 5, 7])
def test_resuming_continues_the_stream_exactly(photos, keys, done):
    opened = folder(photos, **keys)
    whole = take(opened.train(6, seed=2), 9)
    assert_equal(take(opened.train(6, seed=2, start=6 * done), 9 - done), whole[done:])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(photos, count):
    opened = folder(photos, **EVERYTHING)
    whole = take(opened.train(8, seed=2, start=16), 4)
    parts = [take(opened.train(8, 2, 16, (i, count)), 4) for i in range(count)]
    joined = [
        {k: np.concatenate([part[step][k] for part in parts]) for k in whole[0]}
        for step in range(4)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_is_in_order_and_padded_alike_for_all_processes(photos, count):
    opened = folder(photos, size=16)
    # 7 images in batches of 4: one place of padding; rows of a batch go to the processes in order.
    parts = [list(opened.eval(4, (i, count))) for i in range(count)]
    assert [len(part) for part in parts] == [2] * count
    batches = [
        {k: np.concatenate([part[step][k] for part in parts]) for k in parts[0][0]}
        for step in range(2)
    ]
    index = np.concatenate([b["index"] for b in batches])
    np.testing.assert_array_equal(index, [0, 1, 2, 3, 4, 5, 6, -1])
    mask = np.concatenate([b["mask"] for b in batches])
    np.testing.assert_array_equal(mask, index >= 0)
    assert not batches[1]["image"][3].any()
    assert batches[1]["label"][3] == 0
    files = sorted((photos / "test").rglob("*.*g"))
    np.testing.assert_array_equal(batches[0]["image"][1], opened.decode(files[1]))


def test_a_batch_may_exceed_the_split(photos):
    (batch,) = list(folder(photos, size=8).eval(12, (0, 1)))
    assert batch["mask"].sum() == 7
    padding_only = list(folder(photos, size=8).eval(12, (2, 3)))
    assert len(padding_only) == 1
    assert not padding_only[0]["mask"].any()
    (batch,) = take(folder(photos, size=8).train(50, seed=0), 1)
    assert np.bincount(batch["index"], minlength=20).tolist().count(0) == 0


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_and_memory_change_nothing(photos, threads):
    plain = folder(photos, **PADDED, threads=2, cache_mb=0)
    kept = folder(photos, **PADDED, threads=threads, cache_mb=1)
    whole = take(plain.train(6, seed=2), 8)
    assert_equal(take(kept.train(6, seed=2), 8), whole)
    assert_equal(take(kept.train(6, seed=2), 8), whole)  # now all from memory
    assert_equal(list(kept.eval(4)), list(plain.eval(4)))
    assert_equal(list(kept.eval(4)), list(plain.eval(4)))


def test_worker_processes_change_nothing(photos):
    alone, helped = (folder(photos, **EVERYTHING, workers=w) for w in (0, 2))
    assert_equal(
        take(helped.train(6, seed=2, start=12), 5),
        take(alone.train(6, seed=2, start=12), 5),
    )
    assert_equal(list(helped.eval(4)), list(alone.eval(4)))


def run_script(path, text, **keys):
    path.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, path],
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        start_new_session=True,
        **keys,
    )


def test_workers_in_a_plain_script(photos, tmp_path):
    """No absl, a batch in hand at the end of the program, and not a word on stderr; signals are the main process's affair."""
    script = f"""
        import os, signal
        from squeeze_jax import data
        if __name__ == "__main__":
            source = {{"name": "folder", "root": {str(photos)!r}}}
            batches = data.make(source=source, size=16, workers=2).train(4, seed=0)
            next(batches), next(batches)
            for number in signal.SIGINT, signal.SIGTERM:
                signal.signal(number, lambda *_: print("caught", end=" "))
                os.killpg(0, number)
            for _ in range(20):
                batch = next(batches)
            print(batch["index"].tolist())
    """
    done = run_script(tmp_path / "script.py", script, capture_output=True)
    expected = take(folder(photos, size=16).train(4, seed=0), 22)[-1]["index"]
    assert done.stdout.strip() == f"caught caught {expected.tolist()}"
    assert done.stderr == ""


def test_workers_end_when_their_parent_is_killed(photos, tmp_path):
    script = f"""
        import os, signal
        from squeeze_jax import data
        if __name__ == "__main__":
            source = {{"name": "folder", "root": {str(photos)!r}}}
            batches = data.make(source=source, size=16, workers=1).train(4, seed=0)
            next(batches)
            print("one batch", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    # The workers hold the pipe open as well: this returns only once they have ended.
    done = run_script(tmp_path / "script.py", script, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (-9, "one batch\n")


def test_closed_batches_are_over(photos):
    batches = folder(photos, size=8).train(4, seed=0)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_random_numbers_of_a_position_do_not_depend_on_its_neighbours():
    whole = draws(7, 100, 5, vision.DRAWS)
    for i in range(5):
        np.testing.assert_array_equal(draws(7, 100 + i, 1, vision.DRAWS)[0], whole[i])
    assert (draws(8, 100, 5, vision.DRAWS) != whole).all()
    many = draws(0, 0, 4000, vision.DRAWS)
    assert 0 <= many.min() < 1e-4
    assert 1 - 1e-4 < many.max() < 1
    # Mean and variance of U(0, 1), within five standard errors of 256,000 numbers.
    assert abs(many.mean() - 1 / 2) < 5 * (1 / 12 / many.size) ** 0.5
    assert abs(many.var() - 1 / 12) < 5 * (1 / 180 / many.size) ** 0.5
    neighbours = np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / many.size**0.5


@pytest.fixture
def damaged(photos, tmp_path):
    """The folder with a training image cut in half (example 4) and one of another file type altogether (example 15)."""
    root = tmp_path / "damaged"
    shutil.copytree(photos, root)
    half = root / "train" / "ant" / "4.png"
    half.write_bytes(half.read_bytes()[:600])
    (root / "train" / "cow" / "0.png").write_text("not an image")
    return root


@pytest.mark.parametrize("keys", [EVERYTHING, PADDED], ids=["resized", "padded"])
def test_a_corrupt_training_image_is_named(damaged, keys):
    with pytest.raises(UserError) as error:
        take(folder(damaged, **keys).train(20, seed=0), 1)
    line = str(error.value)
    assert "\n" not in line
    assert "ant/4.png" in line or "cow/0.png" in line
    assert "config.data.corrupt='skip'" in line


@pytest.mark.parametrize("keys", [EVERYTHING, PADDED], ids=["resized", "padded"])
def test_a_corrupt_training_image_is_skipped_if_allowed(damaged, keys, caplog):
    opened = folder(damaged, **keys, corrupt="skip")
    with caplog.at_level(logging.WARNING):
        for batch in take(opened.train(20, seed=0), 2):
            assert set(batch["index"][~batch["mask"]]) == {4, 15}
            assert not batch["image"][~batch["mask"]].any()
            assert (batch["label"] >= 0).all()
    warned = " ".join(r.getMessage() for r in caplog.records)
    assert warned.count("ant/4.png") == 1
    assert warned.count("cow/0.png") == 1


def test_a_corrupt_training_image_is_named_by_a_worker_too(damaged):
    with pytest.raises(UserError, match=r"cannot decode image .*(ant/4|cow/0)\.png"):
        take(folder(damaged, size=8, workers=1).train(20, seed=0), 1)


@pytest.mark.parametrize("corrupt", ["raise", "skip"])
def test_a_corrupt_evaluation_image_is_always_an_error(photos, tmp_path, corrupt):
    root = tmp_path / "bad"
    shutil.copytree(photos, root)
    (root / "test" / "bee" / "1.jpeg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(UserError, match=r"cannot decode image .*bee/1\.jpeg"):
        list(folder(root, size=8, corrupt=corrupt).eval(4))


def test_decode_names_what_is_wrong(photos, tmp_path):
    opened = folder(photos, size=8)
    with pytest.raises(UserError, match=r"^cannot read .*gone\.png: No such file"):
        opened.decode(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"^cannot decode image .*text\.png: no known"):
        opened.decode(str(tmp_path / "text.png"))
    with pytest.raises(UserError, match=r"^cannot decode image upload 7: no known"):
        opened.decode(b"hello", name="upload 7")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(
        UserError, match=r"cannot read .*pipe\.png: it is a pipe, not a file"
    ):
        opened.decode(tmp_path / "pipe.png")


def test_normalise():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    opened = data.make(
        source={"name": "digits"}, size=8, channels=3, mean=mean, std=std
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    expected = (pixels / 255.0 - np.array(mean)) / np.array(std)  # float64
    for images in pixels, pixels.astype(np.float32):
        found = jax.jit(opened.inputs)({"image": images})
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=2e-6)
    grey = data.make(source={"name": "digits"}, size=8, mean=(0.5,), std=(0.25,))
    white = grey.inputs({"image": jnp.full((1, 8, 8, 1), 255, jnp.uint8)})
    np.testing.assert_allclose(white, 2.0, atol=1e-6)


def test_images_are_cropped_in_training_evaluation_and_prediction(tmp_path):
    """A red square between two blue ones: the centre is red, and squashed a third of the width."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[:, 16:32] = 255, 0, 0
    for split, label in itertools.product(("train", "test"), "ab"):
        (tmp_path / split / label).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / label / "0.png")
    keys = dict(source=dict(name="folder", root=str(tmp_path)), size=16)
    for resize, red in (dict(), 1.0), (dict(resize="squash"), 1 / 3):
        opened = data.make(**keys, **resize)
        seen = [
            take(opened.train(2, 0), 1)[0]["image"],
            take(opened.eval(2), 1)[0]["image"],
            opened.decode(tmp_path / "test" / "a" / "0.png"),
        ]
        for images in seen:
            # Next to an edge the filter mixes both colours: a pixel's width of the squashed square.
            share = images[..., 0].mean() / 255
            assert share == 1.0 if red == 1.0 else abs(share - red) < 0.02


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (dict(size=0), "config.data.size = 0 should lie in [1, 16384]"),
        (dict(pad=-1), "config.data.pad = -1 should lie in [0, 1024]"),
        (dict(scale=(0.0, 1.0)), "config.data.scale[0] = 0.0 should lie in (0, 1]"),
        (dict(scale=(0.9, 0.5)), "config.data.scale = (0.9, 0.5) should be 0 < low"),
        (dict(randaugment=21), "config.data.randaugment = 21 should lie in [0, 20]"),
        (dict(magnitude=31.0), "config.data.magnitude = 31.0 should lie in [0, 30]"),
        (dict(resize="fit"), "config.data.resize = 'fit'"),
        (dict(resize="squash", eval_resize=9), "config.data.eval_resize = 9 keeps the"),
        (dict(eval_resize=7), "config.data.eval_resize = 7 should be 0 or at least"),
        (dict(mean=(0.1, 0.2)), "config.data.mean has 2 numbers: it should have 1"),
        (dict(std=(0.0,)), "config.data.std[0] = 0.0 should lie in [0.0001, 10000]"),
        (dict(std=1e-45), "config.data.std = 1e-45 should lie in [0.0001, 10000]"),
        (dict(mean=1e30), "config.data.mean = 1e+30 should lie in [-1000, 1000]"),
        (dict(mixup=-0.1), "config.data.mixup = -0.1 should not be negative"),
        (dict(workers=-1), "config.data.workers = -1 should lie in [0, 256]"),
        (dict(source="digits"), "config.data.source = 'digits' (str) should be dict"),
        (
            dict(source={}),
            "config.data.source = {} lacks a name; choose from absent, camvid, coco, digits",
        ),
        (
            dict(source={"name": "digit"}),
            "unknown data source 'digit'; did you mean 'digits'? choose from absent, camvid, coco, digits, ",
        ),
        (
            dict(source={"name": "digits", "dir": "x"}),
            "unknown key config.data.source.dir",
        ),
        (dict(source={"name": "folder"}), "missing key config.data.source.root"),
        (
            dict(source={"name": "folder", "root": 3}),
            "config.data.source.root = 3 (int) should be str",
        ),
    ],
)
def test_mistakes_are_one_line_before_any_work(keys, line):
    with pytest.raises(UserError) as error:
        data.make(**(dict(source={"name": "digits"}, size=8) | keys))
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda d: d.train(6, 0, 0, (0, 4)), "batch = 6 is not divisible by 4 proc"),
        (lambda d: d.train(0, 0), "batch = 0 is not divisible by 1"),
        (lambda d: d.eval(5, (1, 2)), "batch = 5 is not divisible by 2 processes"),
        (lambda d: d.train(6, 0, 8), "cannot resume after 8 examples with batch 6"),
        (lambda d: d.train(6, -1), "seed = -1 should be 0 to 2**32 - 1"),
    ],
)
def test_mistakes_in_asking_for_batches(call, line):
    with pytest.raises(UserError) as error:
        call(data.make(source={"name": "digits"}, size=8))
    assert str(error.value).startswith(line)
