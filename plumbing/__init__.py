"""What a reader of the paper need not open. Stages take its modules by name from `common`."""
