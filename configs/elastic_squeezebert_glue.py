"""A space of small SqueezeBERTs on a task of GLUE: one run trains them all, and each is a work directory by one command.

Iandola et al. 2020, arXiv 2006.11316, and Cai et al. 2019, arXiv 1908.09791. The largest network of the space has three dense layers
of 384 channels. First it is trained alone, with all losses of `glue_squeezebert.py` and the same teacher. Then heads and hidden
channels are sorted by importance, and each step trains the largest, the smallest and a random network by the sandwich rule.
Each convolution of each layer has 1, 2, 3, 4, 6 or 12 groups. The choices below leave out half of them, so that fewer programs
are compiled.

    python run.py --config=configs/glue_minilm.py --job=fit
    python run.py --config=configs/elastic_squeezebert_glue.py --job=fit

The variant that was found by hand, see `squeezebert_general.py`, is one of them:

    python run.py --job=extract --workdir=runs/elastic_squeezebert_glue --config.extract.to=runs/by_hand --config.extract.arch='{
        "ffn": 768, "query_groups": 3, "key_groups": 3, "value_groups": 4, "output_groups": 4, "ffn_in_groups": 4,
        "ffn_out_groups": 4}'

Other tasks are named after a colon. To begin with a network that has learnt from text without labels, train one with
`squeezebert_general.py --config.model.groups=1`, and add here
`--config.init.workdir=runs/squeezebert_general --config.init.only='^(embeddings|layer)'`. To share the weights of the layers as ALBERT does:
`--config.model.distinct=1`.

No results are recorded yet.
"""

from configs import glue_squeezebert


def get_config(task="sst2"):
    config = glue_squeezebert.get_config(task)
    if "init" in config:
        del config.init
    steps = config.steps
    del config.steps
    config.model = dict(name="elastic_squeezebert", variant="small", shuffle=True)
    groups = ("query", "key", "value", "output", "ffn_in", "ffn_out")
    config.phases = (
        dict(steps=steps // 2),
        dict(
            steps=steps,
            begin=dict(name="nas.sort_channels"),
            gradients=dict(
                name="nas.once_for_all",
                random=1,
                choices={f"{name}_groups": (12, 4, 3, 1) for name in groups},
            ),
            optim=dict(lr=1e-4),
        ),
    )
    config.checkpoint = dict(use="newest")
    return config
