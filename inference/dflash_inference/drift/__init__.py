"""Served acceptance over time: whether it fell, through what, and when tuning pays.

    dflash-train drift recipe=NAME data.logs=LOGS

`alarm` watches a stream of requests one after the other, `streams` says which streams there are,
`shares` divides a fall into mix and content, `payback` weighs it against the cost of a tuning,
`findings` puts these together and `table` prints them.
"""
