"""ELECTRA-small pretrained from raw text (Clark et al., arXiv 2003.10555): a generator replaces tokens, the net finds them.

    python run.py --config=configs/electra_pretraining.py --job=fit --config.data.files='("text.txt.gz",)' \\
        --config.data.tokenizer=vocab.txt

What is fine-tuned of it is the discriminator, by any config of text that begins with the run:

    python run.py --config=configs/glue_minilm.py:mrpc --job=fit --workdir=runs/electra_mrpc \\
        --config.init='{"workdir": "runs/electra_pretraining"}' --config.data.tokenizer=vocab.txt --config.optim.lr=3e-4
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.data = dict(
        name="pretraining",
        files=("text.txt",),
        tokenizer="vocab.txt",
        length=128,
        kind="replaced",
    )
    config.model = dict(name="electra_pretraining", variant="small")
    config.batch = 128  # Table 6
    config.steps = 1_000_000
    config.optim = dict(
        name="adamw",
        lr=5e-4,
        eps=1e-6,
        schedule="linear",
        warmup=10_000,
        decay=0.01,
        clip=1.0,
    )
    config.save_every = 5000
    config.eval_every = 50_000
    return config
