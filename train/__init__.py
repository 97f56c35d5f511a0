"""Programs that train: one loop for every model (`train.loop`), one job module per kind of model."""
