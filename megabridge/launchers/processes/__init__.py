"""The one supervisor of everything that we start: forked ranks, ranks that are programs of their own, the points of a sweep.

A process ends well when it exits with status 0 after a report that says so (outcome.py). Anything else is a failure: what it
reported, or what its end says where it could not report (children.py). No process outlives whoever started it (ending.py).
"""
