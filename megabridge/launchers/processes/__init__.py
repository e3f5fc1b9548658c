"""Process supervision: starts, watches and ends child processes (forked ranks, ranks as programs, the points of a sweep).

A process succeeds if it exits with status 0 after reporting success (outcome.py). Anything else is a failure: the one that it
reported, or one inferred from its exit status (`outcome.of_exit`). No process outlives the one that started it (ending.py).
"""
