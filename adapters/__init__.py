"""One file per upstream family, loaded late by `common.load_model` and `common.load_scorer`
(docs/adapters.md)."""
