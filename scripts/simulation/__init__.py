"""A cluster on a virtual clock: real routing, index and uploads; workers by their rates.

trace.py      prompts and when they come
worker.py     a worker: its queue, its tiers, what it reports
cluster.py    the clock, etcd's part, and one run
policies.py   what is compared: ours, and the formulas of others
summary.py    figures of a run
"""
