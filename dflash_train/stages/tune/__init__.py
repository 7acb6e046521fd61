"""`dflash-train tune`: from the drafter that serves and a new log to its successor, or not.

`start.py` fixes what a tuning starts from and by which rule it will be judged, before anything
runs; `walk.py` runs the stages and says how it ended; `judging.py` is the last of them;
`foresight.py` says beforehand what it would take.
"""
