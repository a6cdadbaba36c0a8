"""The code of the workers: data, model, training, checkpoint, evaluation.

Start reading at `training/train.py`. `config.py` holds the settings of this package and imports no torch.
"""
