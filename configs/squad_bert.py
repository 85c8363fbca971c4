"""An encoder that transformers has saved, fine-tuned to answer questions: SQuAD 1.1 or 2.0, arXiv 1606.05250 and 1806.03822.

    python run.py --config=configs/squad_bert.py --job=fit --config.init.folder=FOLDER --config.data.tokenizer=FOLDER
    python run.py --job=predict --workdir=runs/squad_bert DOCUMENT.txt "Who wrote it?"

`--job=submit` writes predictions.json, which the official evaluation reads. Not trained here: SQuAD's training questions
have to be fetched, and a GPU helps.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.init = dict(folder="bert-base-uncased")
    config.data = dict(
        name="squad",
        train="squad/train-v1.1.json",
        eval="squad/dev-v1.1.json",
        tokenizer="bert-base-uncased",
        length=384,
        stride=128,
        buckets=(192, 256),
    )
    config.batch = 32
    config.steps = 2 * 88_000 // config.batch  # two epochs of windows
    config.optim = dict(
        name="adamw", lr=3e-5, schedule="linear", warmup=0.1, decay=0.01, clip=1.0
    )
    config.eval_every = config.save_every = 1000
    return config
