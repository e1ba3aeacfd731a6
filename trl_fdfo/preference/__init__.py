"""
A server where people compare the images of a prompt, and what trainers and people say to it.

The reward is [`trl_fdfo.rewards.HumanPreference`]. Start a server by `trl-fdfo vote`, and see docs/voting.md.
"""
