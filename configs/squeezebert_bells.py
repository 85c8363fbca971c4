"""SqueezeBERT with bells and whistles, second stage: each task from a teacher of its own (arXiv 2006.11316, section 4.2).

The student begins with what the first stage, `squeezebert_bells_mnli.py`, has learnt; its classifier begins anew where the
task has other classes. The teacher is a BERT-base fine-tuned on the task, a folder or a run of this project.

    python run.py --config=configs/squeezebert_bells.py --job=seeds --config.data.task=rte --config.steps=780 \\
        --config.distill.teachers='({"folder": "bert-base-rte"},)' --workdir=runs/bells_rte
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.init = dict(workdir="runs/squeezebert_bells_mnli")
    config.data = dict(
        name="glue",
        task="rte",
        folder="glue",
        tokenizer="squeezebert-uncased",
        length=128,
        buckets=(32, 64),
    )
    config.distill = dict(teachers=(dict(folder="bert-base-rte"),))
    config.objective = (
        dict(name="losses.cross_entropy", weight=0.5),
        dict(name="distill.soft_logits", temperature=2.0, weight=0.5),
        dict(name="distill.hidden"),
    )
    config.batch = 32
    config.steps = 10 * 2_490 // config.batch  # ten epochs of RTE
    config.seeds = (0, 1, 2, 3, 4)
    config.optim = dict(
        name="adamw", lr=3e-5, schedule="linear", warmup=0.1, decay=0.01, clip=1.0
    )
    return config
