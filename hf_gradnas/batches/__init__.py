"""What a model is run on: batches, loaders, steps of all processes, small samples."""
