"""How well requests were drafted for when they were served: logs and counters -> rows of numbers.

`calls` reads request logs through the adapters of `ingest`, `pages` the counters of a server's
`/metrics`, `readings` keeps what a polled server said. All give `dflash_train.records.served` rows,
which `dflash_inference.drift` watches.
"""
