"""A two-layer LSTM language model on Penn Treebank (Zaremba, Sutskever, Vinyals 2014, arXiv 1409.2329).

    python run.py --config=configs/lstm_ptb.py --job=fit --config.data.train=ptb.train.txt --config.data.eval=ptb.valid.txt
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.data = dict(
        name="contiguous", train="ptb.train.txt", eval="ptb.valid.txt", length=20
    )
    config.model = dict(name="lstm", variant="small")
    config.batch = 20
    config.steps = 13 * 2323
    # The paper adds up the loss over the steps of a window, here it is their mean: the rate is larger by that factor.
    length = config.data.length
    config.optim = dict(
        name="sgd", momentum=0.0, lr=1.0 * length, schedule="constant", clip=5.0 / length
    )
    config.save_every = 1000
    config.export = dict(formats=("stablehlo", "tflite"))
    return config
