"""What a reader of the paper need not open. Stages take its rooms by name from `common`."""
