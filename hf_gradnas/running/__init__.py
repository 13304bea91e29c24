"""How a model is run: processes, what is put around a model, shards, states put back."""
