"""Programs that train: one loop for every model (`imgtok.train.loop`), one job module per kind of model."""
