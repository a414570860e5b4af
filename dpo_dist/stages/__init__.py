"""A file a stage: `run(config) -> path of its artifact`, the same on every rank.

Stages meet through files. What a user calls by hand is no stage and lies in commands/.
"""
