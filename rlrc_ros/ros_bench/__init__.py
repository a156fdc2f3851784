"""Measures the running nodes: `rlrc bench --ros`.

Real processes over real DDS. `sources` plays two cameras, joint states and the end effector's pose;
`relay` is the least that a node in Python can do with them, the yardstick; `watched_policy` is the
policy node, with a note of every image it got and of how long its policy took. `run` starts them
beside the command guard and the recorder, `rows` turns what they noted into a table.
"""
