"""The stages of a run: what each reads, writes and costs to repeat; `run` walks them.

    dflash-train run recipe=smollm2

This room is the one place where the data pipelines, the trainer and the decoder meet, inside
functions only: `table` lists the stages, `work` calls what each does, `inputs` hashes what no stage
wrote, `walk` decides which must run, `workshop` holds what they share, `estimates` is `--dry-run`,
`tools` are the verbs that belong to no run.
"""
