"""Files and media: what a reader of the paper need not open. Stages use it through `common`."""
