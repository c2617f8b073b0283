"""The training job: driver, loop, engine, checkpoints, tracking."""
