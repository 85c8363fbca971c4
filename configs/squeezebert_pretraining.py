"""SqueezeBERT pretrained from raw text: masked tokens and the order of sentences, with LAMB (arXiv 2006.11316, section 4.1).

The recipe is that of the paper, with a batch and steps for one machine instead of 8192 and 56,000; a document is what stands
between blank lines, a line is a sentence. A vocabulary of your own text: `data.tokens.train`.

    python run.py --config=configs/squeezebert_pretraining.py --job=fit --config.data.files='("text.txt.gz",)' \\
        --config.data.tokenizer=vocab.txt
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.data = dict(
        name="pretraining",
        files=("text.txt",),
        tokenizer="vocab.txt",
        length=128,
        order="sentence_order",
    )
    config.model = dict(name="squeezebert", variant="base")
    config.batch = 256
    config.accumulate = 8
    config.steps = 56_000
    config.optim = dict(
        name="lamb",
        lr=2.5e-3 * (256 / 8192) ** 0.5,
        schedule="linear",
        warmup=0.28,
        decay=0.01,
    )  # the square root is LAMB's rule for another batch, arXiv 1904.00962
    config.save_every = 1000
    config.eval_every = 5000
    return config
