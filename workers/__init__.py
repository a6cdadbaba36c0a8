"""Everything that runs on a worker: the data plane, the training loop, evaluation. Imports `losses` and nothing above.

Start reading at `train.py`. `config.py` holds the settings of this package and imports no torch.
"""
