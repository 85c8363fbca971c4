"""SqueezeBERT with bells and whistles, first stage: distillation on MNLI (arXiv 2006.11316, section 4.2).

The student begins with the pretrained network and learns MNLI from a BERT-base that was fine-tuned on it, by soft logits
and hidden states of equal layers. The second stage is `squeezebert_bells.py`. Folders `bert-base-mnli` and
`squeezebert-uncased` are those that transformers saves; `glue` holds GLUE's files.

    python run.py --config=configs/squeezebert_bells_mnli.py --job=fit

Not trained here: both networks have to be fetched, and MNLI takes a GPU.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.init = dict(folder="squeezebert-uncased")
    config.data = dict(
        name="glue",
        task="mnli",
        folder="glue",
        tokenizer="squeezebert-uncased",
        length=128,
        buckets=(32, 64),
    )
    config.distill = dict(teachers=(dict(folder="bert-base-mnli"),))
    config.objective = (
        dict(name="distill.soft_logits", temperature=2.0),
        dict(name="distill.hidden"),
    )
    config.batch = 32
    config.steps = 3 * 392_702 // config.batch  # three epochs
    config.optim = dict(
        name="adamw", lr=3e-5, schedule="linear", warmup=0.1, decay=0.01, clip=1.0
    )
    config.eval_every = config.save_every = 5000
    return config
