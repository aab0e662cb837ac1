"""One file per upstream family, loaded late by `common.load_model` and `common.ScorerSet`
(docs/adapters.md)."""
