"""Code that a reader of the paper need not open. Stages import its modules from `common`."""
